import { KubeConfig } from '@kubernetes/client-node'

/** Context that client-node invents, with http://localhost:8080, if it finds no kubeconfig. */
const INVENTED_CONTEXT = 'loaded-context'
const SOURCES = "KUBECONFIG, ~/.kube/config or a pod's service account"

/**
 * Reads the kubeconfig at `path`, else of `KUBECONFIG`, the user's file or the pod's service
 * account. Throws if there is none, or if it has no cluster.
 */
export function loadKubeconfig(path: string | undefined): KubeConfig {
  const config = new KubeConfig()
  try {
    if (path === undefined) config.loadFromDefault()
    else config.loadFromFile(path)
  } catch (err) {
    // Parsers quote the lines around an error, which may contain credentials.
    const [words = ''] = (err instanceof Error ? err.message : String(err)).split('\n')
    throw new Error(`the kubeconfig cannot be read (${words}). It is read from ${SOURCES}`)
  }
  const cluster = config.getCurrentCluster()
  const isInvented =
    config.currentContext === INVENTED_CONTEXT && cluster?.server === 'http://localhost:8080'
  if (path === undefined && isInvented) throw new Error(`no kubeconfig was found: ${SOURCES}`)
  if (!cluster) {
    const context = `its current context "${config.currentContext ?? ''}"`
    throw new Error(
      `the kubeconfig has no cluster: ${context} names none. It is read from ${SOURCES}`,
    )
  }
  return config
}
