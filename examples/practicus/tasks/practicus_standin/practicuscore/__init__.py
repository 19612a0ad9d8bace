"""Stands in for the Practicus SDK where that is not installed, so that task files which import it run unchanged.
Standard library only. Where the real SDK is installed, this steps aside for it.

    import practicuscore as prt

    prt.logger.info("…")                          # to the task's log; PRT_LOG_LEVEL sets the level
    value, age = prt.vault.get_secret("API_KEY")  # one that the worker_config names
    prt.models.deploy(…)                          # by deployer_task.py, into MODEL_REPOSITORY
    prt.notebooks.execute_notebook("report")      # where papermill is installed

Anything else raises NotHere.
"""

import importlib.machinery
import importlib.util
import logging
import os
import re
import subprocess
import sys

_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_real = importlib.machinery.PathFinder.find_spec(
    __name__, [path for path in sys.path if os.path.abspath(path or ".") != _FOLDER]
)
if _real is not None and _real.loader is not None:
    _module = importlib.util.module_from_spec(_real)
    sys.modules[__name__] = _module
    _real.loader.exec_module(_module)


class NotHere(AttributeError, NotImplementedError):
    """The task uses what only the Practicus AI platform has."""


def __getattr__(name: str):
    # Python itself asks for these.
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotHere(
        f"practicuscore.{name} is not here: this is the task runner's stand-in for the Practicus SDK, which has logger, "
        "vault.get_secret, models.deploy and notebooks.execute_notebook. Install the SDK, or change the task"
    )


class _Part:
    """A part of the SDK: has what is defined below, and says so where a task asks for more."""

    def __getattr__(self, name: str):
        return __getattr__(f"{type(self).__name__.strip('_').lower()}.{name}")


class _Vault(_Part):
    def get_secret(self, name: str, shared=None):
        """The secret's value, and 0, since nobody knows its age here. Raises KeyError when the worker has none."""
        # As the service names the variables of secrets.
        variable = re.sub(r"^(?=[0-9])", "_", re.sub(r"[^A-Za-z0-9_]", "_", name))
        if variable not in os.environ:
            field = "shared_secrets" if shared else "personal_secrets"
            raise KeyError(f"the secret {name!r} is not on this worker: name it in {field} of the worker_config")
        return os.environ[variable], 0


class _Models(_Part):
    def deploy(self, deployment_key: str, prefix: str, model_name: str, model_dir=None, *args, **kwargs):
        """Publishes a model in MODEL_REPOSITORY, as deployer_task.py beside this folder does it. Returns the URLs of the
        model, of the version, and of its metadata. Raises RuntimeError with the deployer's words."""
        settings = {"DEPLOYMENT_KEY": deployment_key, "PREFIX": prefix, "MODEL_NAME": model_name}
        deployer = os.path.join(os.path.dirname(_FOLDER), "deployer_task.py")
        done = subprocess.run(
            [sys.executable, deployer],
            env={**os.environ, **settings, "MODEL_DIR": os.path.expanduser(model_dir or os.getcwd())},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        sys.stdout.write(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip() or f"{deployer} failed with exit code {done.returncode}")
        told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
        return told["api"], told["version"], told["meta"]


class _Notebooks(_Part):
    def execute_notebook(
        self, input_path, parameters=None, cwd=None, kernel_name=None, output_path=None, failed_output_path=None,
        raise_on_failure: bool = False, **kwargs,
    ) -> bool:
        """Runs a notebook with papermill. Returns whether it succeeded; raises its error with `raise_on_failure`."""
        try:
            import papermill
        except ImportError:
            raise NotHere("notebooks need papermill: pip install papermill ipykernel, say in a startup_script") from None
        path = os.path.expanduser(str(input_path))
        path = path if path.endswith(".ipynb") else f"{path}.ipynb"
        output = os.path.expanduser(str(output_path)) if output_path else f"{path[:-len('.ipynb')]}_output.ipynb"
        try:
            papermill.execute_notebook(
                path, output, parameters=parameters or {}, kernel_name=kernel_name,
                cwd=str(cwd or os.path.dirname(os.path.abspath(path))), **kwargs,
            )
        except papermill.PapermillExecutionError as err:
            logger.error("the notebook %s failed: %s", path, err)
            if failed_output_path:
                os.replace(output, os.path.expanduser(str(failed_output_path)))
            if raise_on_failure:
                raise
            return False
        logger.info("the notebook %s succeeded: %s", path, output)
        return True


vault, models, notebooks = _Vault(), _Models(), _Notebooks()

logger = logging.getLogger("practicus")
if not logger.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(_handler)
    logger.propagate = False
    _level = os.environ.get("PRT_LOG_LEVEL", "INFO").upper()
    logger.setLevel(_level if isinstance(logging.getLevelName(_level), int) else "INFO")
