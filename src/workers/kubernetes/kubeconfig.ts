import { KubeConfig } from '@kubernetes/client-node'

/** The context that client-node makes up where it finds no kubeconfig, with a server of http://localhost:8080. */
const MADE_UP_CONTEXT = 'loaded-context'
const SOURCES = "KUBECONFIG, ~/.kube/config or a pod's service account"

/**
 * Reads the kubeconfig at `path`, or the first that is found of `KUBECONFIG`, the user's own and the service account of the
 * pod that we run in. Throws where there is none, or one that names no cluster.
 */
export function loadKubeconfig(path: string | undefined): KubeConfig {
  const config = new KubeConfig()
  try {
    if (path === undefined) config.loadFromDefault()
    else config.loadFromFile(path)
  } catch (err) {
    // Parsers quote the lines around an error, and the file holds credentials.
    const [words = ''] = (err instanceof Error ? err.message : String(err)).split('\n')
    throw new Error(`the kubeconfig cannot be read (${words}). It is taken from ${SOURCES}`)
  }
  const cluster = config.getCurrentCluster()
  const isMadeUp =
    config.currentContext === MADE_UP_CONTEXT && cluster?.server === 'http://localhost:8080'
  if (path === undefined && isMadeUp) throw new Error(`no kubeconfig was found: ${SOURCES}`)
  if (!cluster) {
    const context = `its current context "${config.currentContext ?? ''}"`
    throw new Error(
      `the kubeconfig names no cluster: ${context} has none. It is taken from ${SOURCES}`,
    )
  }
  return config
}
