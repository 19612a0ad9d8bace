import type { Job, KubernetesObject, Pod, PodSpec, Resource } from './resources.ts'

/** What a server fills in, as far as anything here depends on it. */
export function setDefaults(resource: Resource, object: KubernetesObject): void {
  if (resource === 'secrets') object.type ??= 'Opaque'
  if (resource === 'jobs') {
    const job = object as Job
    job.metadata.generation = 1
    job.spec = {
      backoffLimit: 6,
      completions: 1,
      parallelism: 1,
      completionMode: 'NonIndexed',
      manualSelector: false,
      suspend: false,
      podReplacementPolicy: job.spec.podFailurePolicy ? 'Failed' : 'TerminatingOrFailed',
      ...job.spec,
    }
    setPodDefaults(job.spec.template.spec)
    linkPods(job)
    job.status = {}
  }
  if (resource === 'pods') {
    const pod = object as Pod
    setPodDefaults(pod.spec)
    pod.status = { phase: 'Pending', qosClass: 'Burstable' }
  }
}

function setPodDefaults(spec: PodSpec): void {
  Object.assign(spec, {
    restartPolicy: 'Always',
    terminationGracePeriodSeconds: 30,
    dnsPolicy: 'ClusterFirst',
    schedulerName: 'default-scheduler',
    securityContext: {},
    ...spec,
  })
  for (const container of [...(spec.initContainers ?? []), ...spec.containers]) {
    Object.assign(container, {
      terminationMessagePath: '/dev/termination-log',
      terminationMessagePolicy: 'File',
      imagePullPolicy: /:latest$|^[^:@]+$/.test(container.image) ? 'Always' : 'IfNotPresent',
      resources: {},
      ...container,
    })
  }
}

/** A Job's pods are found by its uid. */
function linkPods({ metadata, spec }: Job): void {
  const { uid, name } = metadata
  spec.selector = { matchLabels: { 'batch.kubernetes.io/controller-uid': uid } }
  const labels = {
    'batch.kubernetes.io/controller-uid': uid,
    'batch.kubernetes.io/job-name': name,
    'controller-uid': uid,
    'job-name': name,
  }
  spec.template.metadata = {
    ...spec.template.metadata,
    labels: { ...spec.template.metadata?.labels, ...labels },
  }
}
