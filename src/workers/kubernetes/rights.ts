import type { KubernetesApi } from './api.ts'
import { ApiUnavailableError } from './failures.ts'

const REVIEWS = '/apis/authorization.k8s.io/v1/selfsubjectaccessreviews'

export interface Right {
  group: string
  /** `pods`, or with a subresource: `pods/log`. */
  resource: string
  verbs: readonly string[]
}

/** Returns the rights that we lack in the namespace, such as `get pods/log`. */
export async function missingRights(
  api: KubernetesApi,
  namespace: string,
  rights: readonly Right[],
): Promise<string[]> {
  try {
    return await reviewed(api, namespace, rights)
  } catch (err) {
    // A cluster may forbid this review; then the calls themselves show missing rights.
    if (err instanceof ApiUnavailableError && err.kind === 'forbidden') return []
    throw err
  }
}

async function reviewed(
  api: KubernetesApi,
  namespace: string,
  rights: readonly Right[],
): Promise<string[]> {
  const asked = rights.flatMap(({ group, resource, verbs }) =>
    verbs.map(async (verb) => {
      const [name, subresource] = resource.split('/')
      const resourceAttributes = {
        namespace,
        group,
        verb,
        resource: name,
        ...(subresource === undefined ? {} : { subresource }),
      }
      const body = {
        apiVersion: 'authorization.k8s.io/v1',
        kind: 'SelfSubjectAccessReview',
        spec: { resourceAttributes },
      }
      const { status } = await api.json<{ status?: { allowed?: boolean } }>('POST', REVIEWS, {
        body,
        answer: 'SelfSubjectAccessReview',
        isUrgent: true,
      })
      return status?.allowed ? [] : [`${verb} ${resource}`]
    }),
  )
  return (await Promise.all(asked)).flat()
}
