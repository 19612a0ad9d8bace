import { RESOURCES, type Resource } from './resources.ts'

const VERBS = ['create', 'delete', 'deletecollection', 'get', 'list', 'patch', 'update', 'watch']

function resourceList(groupVersion: string, group: string): object {
  const resources = Object.entries(RESOURCES)
    .filter(([, info]) => info.group === group)
    .flatMap(([name, { kind, shortNames, subresources = [] }]) => [
      {
        name,
        singularName: kind.toLowerCase(),
        namespaced: (name as Resource) !== 'namespaces',
        kind,
        verbs: VERBS,
        ...(shortNames && { shortNames }),
      },
      ...subresources.map((sub) => ({
        name: `${name}/${sub}`,
        singularName: '',
        namespaced: true,
        kind,
        verbs: sub === 'log' ? ['get'] : ['get', 'patch', 'update'],
      })),
    ])
  return { kind: 'APIResourceList', apiVersion: 'v1', groupVersion, resources }
}

const group = (name: string) => {
  const version = { groupVersion: `${name}/v1`, version: 'v1' }
  return { name, versions: [version], preferredVersion: version }
}

/** Says that creating takes `fieldValidation`: without it, kubectl wants the whole OpenAPI document. */
const openApi = (group: string, version: string, kind: string, path: string) => ({
  openapi: '3.0.0',
  info: { title: 'Kubernetes', version: 'v1.32.4' },
  paths: {
    [path]: {
      patch: {
        parameters: [{ name: 'fieldValidation', in: 'query', schema: { type: 'string' } }],
        'x-kubernetes-action': 'patch',
        'x-kubernetes-group-version-kind': { group, version, kind },
        responses: {},
      },
    },
  },
})

export const DISCOVERY: Record<string, unknown> = {
  '/version': {
    major: '1',
    minor: '32',
    gitVersion: 'v1.32.4',
    gitCommit: '0'.repeat(40),
    gitTreeState: 'clean',
    buildDate: '2025-05-15T00:00:00Z',
    goVersion: 'go1.23.8',
    compiler: 'gc',
    platform: 'linux/amd64',
  },
  '/api': {
    kind: 'APIVersions',
    versions: ['v1'],
    serverAddressByClientCIDRs: [{ clientCIDR: '0.0.0.0/0', serverAddress: '127.0.0.1' }],
  },
  '/apis': {
    kind: 'APIGroupList',
    apiVersion: 'v1',
    groups: [group('batch'), group('authorization.k8s.io')],
  },
  '/apis/batch': { kind: 'APIGroup', apiVersion: 'v1', ...group('batch') },
  '/api/v1': resourceList('v1', ''),
  '/apis/batch/v1': resourceList('batch/v1', 'batch'),
  '/apis/authorization.k8s.io/v1': {
    kind: 'APIResourceList',
    apiVersion: 'v1',
    groupVersion: 'authorization.k8s.io/v1',
    resources: [
      {
        name: 'selfsubjectaccessreviews',
        singularName: 'selfsubjectaccessreview',
        namespaced: false,
        kind: 'SelfSubjectAccessReview',
        verbs: ['create'],
      },
    ],
  },
  '/openapi/v3': {
    paths: {
      'api/v1': { serverRelativeURL: '/openapi/v3/api/v1?hash=1' },
      'apis/batch/v1': { serverRelativeURL: '/openapi/v3/apis/batch/v1?hash=1' },
    },
  },
  '/openapi/v3/api/v1': openApi('', 'v1', 'Pod', '/api/v1/namespaces/{namespace}/pods/{name}'),
  '/openapi/v3/apis/batch/v1': openApi(
    'batch',
    'v1',
    'Job',
    '/apis/batch/v1/namespaces/{namespace}/jobs/{name}',
  ),
}
