#!/usr/bin/env python3
"""Runs the DAG of examples/airflow, as shipped, in a real Airflow against the real service.

Its own Python has that Airflow. Prints one line a case. The first case that fails ends the run with
exit code 1, and with all that Airflow and the service wrote.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

DAG = "run_task_safe"
TOKEN = "token-of-the-airflow-witness-0123456789"
CASE_SECONDS = 240


class Wrong(Exception):
    """A case saw something else than it expects."""


def expect(what, seen, expected):
    if seen != expected:
        raise Wrong(f"{what}\n  seen:     {seen}\n  expected: {expected}")


def expect_in(text, output):
    if text not in output:
        raise Wrong(f"the output does not have: {text}")


def until(what, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Wrong(f"not within {seconds} s: {what}")
        time.sleep(0.1)


class Process:
    """A program in a process group of its own, so that it can be ended with all that it started."""

    def __init__(self, command, env, output):
        self.path = output
        with open(output, "ab") as file:
            self.popen = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self):
        return self.path.read_text(errors="replace")

    def wait(self):
        return self.popen.wait(CASE_SECONDS)

    def end(self):
        try:
            os.killpg(self.popen.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


class Service:
    """The task runner with local workers, on a data folder and a copy of tasks/ of its own."""

    def __init__(self, folder):
        self.log = folder / "service.log"
        self.tasks_dir = folder / "tasks"
        shutil.copytree(ROOT / "tasks", self.tasks_dir)
        self.env = {
            "PATH": os.environ["PATH"],
            "DATA_DIR": str(folder / "data"),
            "TASKS_DIR": str(self.tasks_dir),
            "API_TOKENS": TOKEN,
            "PYTHON_COMMAND": "/usr/bin/python3",
        }
        self.port = 0
        self.seen = set()
        self.start()

    def start(self):
        begin = self.log.stat().st_size if self.log.exists() else 0
        node = ROOT / "node_modules/.bin/node"
        env = {**self.env, "PORT": str(self.port)}
        self.process = Process([node, "src/main.ts"], env, self.log)

        def address():
            if self.process.popen.poll() is not None:
                raise Wrong("the service does not start")
            for line in self.process.output()[begin:].splitlines():
                if '"msg":"listening"' in line:
                    return json.loads(line)["address"]

        try:
            self.url = until("the service listens", address)
        except Wrong:
            self.process.end()
            raise
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self):
        os.kill(self.process.popen.pid, signal.SIGKILL)
        self.process.popen.wait()

    def call(self, path, method="GET"):
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()

    def get(self, path):
        return json.loads(self.call(path))

    def new_tasks(self):
        """The tasks of this case, by the Airflow task that they are named after."""
        listed = [each["task_id"] for each in self.get("/tasks?limit=100")["tasks"]]
        ids = [each for each in listed if each not in self.seen]
        return {each.split(".")[1]: self.get(f"/tasks/{quoted(each)}") for each in ids}

    def status_of(self, way):
        return self.new_tasks().get(way, {}).get("status")

    def next_case(self):
        self.seen.update(each["task_id"] for each in self.get("/tasks?limit=100")["tasks"])

    def log_of(self, way):
        return self.call(f"/tasks/{quoted(self.new_tasks()[way]['task_id'])}/logs")

    def expect_no_worker(self):
        until("no worker is left", lambda: self.get("/workers") == {"workers": []})

    def end(self):
        try:
            for task in self.get("/tasks?limit=100")["tasks"]:
                if task["status"] not in ("succeeded", "failed", "cancelled"):
                    self.call(f"/tasks/{quoted(task['task_id'])}/cancel", "POST")
            self.expect_no_worker()
        finally:
            self.process.end()


def quoted(task_id):
    return urllib.parse.quote(task_id, safe="")


class LosesAnswers(ThreadingHTTPServer):
    """A proxy between Airflow and the service. While `withholds` is set it gives no answer to what
    `submit` posts: the connection breaks instead, once `breaks` is set."""

    def __init__(self, service):
        outer = self
        self.withholds = True
        self.breaks = threading.Event()
        self.withheld = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                request = urllib.request.Request(
                    service.url + self.path, body or None, method=self.command
                )
                for name in ("authorization", "content-type"):
                    if name in self.headers:
                        request.add_header(name, self.headers[name])
                try:
                    response = urllib.request.urlopen(request, timeout=10)
                except urllib.error.HTTPError as err:
                    response = err
                with response:
                    answer = response.read()
                is_submit = self.path == "/task-runner" and f'"{DAG}.name.' in body.decode()
                if is_submit and outer.withholds:
                    outer.withheld += 1
                    outer.breaks.wait()
                    self.close_connection = True
                    return
                self.send_response(response.status)
                self.send_header("content-type", response.headers["content-type"])
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self):
        self.breaks.set()
        self.shutdown()
        self.server_close()


class Airflow:
    """An Airflow with a home of its own and the files of the example, copied as its README says."""

    def __init__(self, version, bin_folder, folder, service):
        self.version = version
        self.major = version.split(".")[0]
        self.bin = bin_folder
        self.home = folder / "airflow"
        self.dags = folder / "dags"
        self.service = service
        self.port = free_port()
        shutil.copytree(ROOT / "examples/airflow", self.dags)
        shutil.copy(ROOT / "examples/python/task_runner_client.py", self.dags)
        self.env = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HOME": str(folder),
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.port}/execution/",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API_AUTH__JWT_SECRET": "secret-of-the-airflow-witness-" + "0" * 64,
            # How soon a task notices that its run was marked.
            "AIRFLOW__SCHEDULER__JOB_HEARTBEAT_SEC": "1",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        self.command("db", "migrate")
        extra = json.dumps({"Authorization": f"Bearer {TOKEN}"})
        self.command(
            *("connections", "add", "task_runner", "--conn-type", "http"),
            *("--conn-host", service.url, "--conn-extra", extra),
        )

    def command(self, *arguments):
        self.program(self.bin / "airflow", *arguments)

    def program(self, *command):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise Wrong(f"{command} failed:\n{done.stdout}{done.stderr}")

    def start(self, *arguments, env=None):
        output = Path(tempfile.mkstemp(dir=self.home, suffix=f"-{arguments[0]}.log")[1])
        return Process([self.bin / "airflow", *arguments], {**self.env, **(env or {})}, output)

    def state_of(self, task):
        return self.newest_run()[1].get(task, (None,))[0]

    def programs(self):
        """The commands of a deployment: what runs DAGs that were triggered."""
        scheduler = ("scheduler", "--skip-serve-logs")
        if self.major == "2":
            return (scheduler,)
        api = ("api-server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        return (api, scheduler, ("dag-processor",))

    def listens(self):
        with closing(socket.socket()) as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def trigger(self, run_id):
        self.command("dags", "trigger", DAG, "--run-id", run_id)

    def mark_failed(self, run_id):
        """Does what the button on the page of the run does."""
        if self.major == "2":
            self.program(self.bin / "python", "-c", MARK_FAILED, DAG, run_id)
            return
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/auth/token") as response:
            token = json.load(response)["access_token"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v2/dags/{DAG}/dagRuns/{run_id}",
            b'{"state": "failed"}',
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            method="PATCH",
        )
        urllib.request.urlopen(request).close()

    def connection(self, url, token):
        """An environment whose connection takes precedence over the one in the database."""
        extra = {"Authorization": f"Bearer {token}"}
        connection = json.dumps({"conn_type": "http", "host": url, "extra": extra})
        return {"AIRFLOW_CONN_TASK_RUNNER": connection}

    def query(self, sql):
        with closing(sqlite3.connect(f"file:{self.home}/airflow.db?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchall()

    def knows_dag(self):
        return self.query("SELECT dag_id FROM serialized_dag") != []

    def newest_run(self):
        """Its state, and (state, tries) of its tasks."""
        newest = "(SELECT run_id FROM dag_run ORDER BY id DESC LIMIT 1)"
        [(state,)] = self.query(f"SELECT state FROM dag_run WHERE run_id = {newest}")
        tasks = self.query(
            f"SELECT task_id, state, try_number FROM task_instance WHERE run_id = {newest}"
        )
        return state, {task_id: (state, tries) for task_id, state, tries in tasks}


MARK_FAILED = """
import sys
from airflow.api.common.mark_tasks import set_dag_run_state_to_failed
from airflow.models.serialized_dag import SerializedDagModel
dag_id, run_id = sys.argv[1:]
set_dag_run_state_to_failed(dag=SerializedDagModel.get_dag(dag_id), run_id=run_id, commit=True)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Witness:
    def __init__(self, folder, service, airflow):
        self.gates = folder / "gates"
        self.service = service
        self.airflow = airflow
        self.hello = service.tasks_dir / "hello.py"

    @contextmanager
    def case(self, name):
        begin = time.monotonic()
        self.processes = []
        self.service.next_case()
        shutil.rmtree(self.gates, ignore_errors=True)
        self.gates.mkdir()
        title = f"airflow {self.airflow.version}: {name}"
        try:
            yield
        except BaseException as err:
            print(f"{title}: FAILED after {time.monotonic() - begin:.1f} s: {err}", flush=True)
            outputs = {process.path: process.output() for process in self.processes}
            outputs[self.service.log] = self.service.process.output()
            for path, output in outputs.items():
                print(f"--- {path.name}\n{output}", flush=True)
            raise
        finally:
            for process in self.processes:
                process.end()
        print(f"{title}: {time.monotonic() - begin:.1f} s", flush=True)

    def start(self, *arguments, **options):
        process = self.airflow.start(*arguments, **options)
        self.processes.append(process)
        return process

    def dags_test(self, **options):
        return self.start("dags", "test", DAG, **options)

    def write_gated_hello(self):
        """Makes hello.py run until there is a file with the name of its way."""
        self.hello.write_text(
            "import os, time\n"
            "print('begun', flush=True)\n"
            f"gates = {str(self.gates)!r}\n"
            "way = os.environ['TASK_ID'].split('.')[1]\n"
            "while os.path.exists(gates) and not os.path.exists(f'{gates}/{way}'):\n"
            "    time.sleep(0.1)\n"
            "print('ended')\n"
        )

    def open_gate(self, way):
        (self.gates / way).touch()

    def expect_run(self, state, **tasks):
        expect("the run and its tasks", self.airflow.newest_run(), (state, tasks))

    def expect_tasks(self, **expected):
        tasks = self.service.new_tasks()
        seen = {way: (task["status"], task["reason"]) for way, task in tasks.items()}
        expect("the tasks of the service", seen, expected)
        self.service.expect_no_worker()

    def success(self):
        """As shipped, with the hello.py of tasks/."""
        shutil.copy(ROOT / "tasks/hello.py", self.hello)
        run = self.dags_test()
        expect("exit code", run.wait(), 0)
        expect_in("Hello from Python", run.output())
        self.expect_success()
        pushed = self.airflow.query("SELECT key FROM xcom WHERE task_id = 'run_safe'")
        expect("what run_safe returns", pushed, [("return_value",)])
        ours = [line for line in run.output().splitlines() if str(self.airflow.dags) in line]
        expect("warnings of our files", [line for line in ours if "warning" in line.lower()], [])

    def expect_success(self):
        once, succeeded = ("success", 1), ("succeeded", "completed")
        self.expect_run("success", name=once, submit=once, wait=once, cancel=once, run_safe=once)
        self.expect_tasks(name=succeeded, run_safe=succeeded)

    def failure(self):
        """The run fails without a retry, and the end of the script's log is in Airflow's."""
        self.hello.write_text(
            "import os, sys\n"
            "print('last words of', os.environ['TASK_ID'].split('.')[1])\n"
            "sys.exit(3)\n"
        )
        run = self.dags_test()
        expect("exit code", run.wait(), 1)
        for way in ("name", "run_safe"):
            expect_in(f"last words of {way}", run.output())
        expect_in("failed: exit_code, Exit code 3", run.output())
        once, failed = ("success", 1), ("failed", 1)
        self.expect_run(
            "failed", name=once, submit=once, wait=failed, cancel=once, run_safe=failed
        )
        self.expect_tasks(name=("failed", "exit_code"), run_safe=("failed", "exit_code"))

    def invalid(self):
        """The worker file has a misspelt field, which the refusal names."""
        worker = self.airflow.dags / "default_worker.json"
        shipped = worker.read_text()
        worker.write_text(json.dumps({**json.loads(shipped), "worker_sise": "Small"}))
        try:
            run = self.dags_test()
            expect("exit code", run.wait(), 1)
        finally:
            worker.write_text(shipped)
        expect_in("the service refused it with 422", run.output())
        expect_in("RequestRefused: 422", run.output())
        expect_in("worker_sise", run.output())
        self.expect_refused(cancel=("success", 1))

    def unauthorized(self):
        run = self.dags_test(env=self.airflow.connection(self.service.url, "not-the-token"))
        expect("exit code", run.wait(), 1)
        expect_in("the service refused it with 401", run.output())
        expect_in("RequestRefused: 401", run.output())
        self.expect_refused(cancel=("failed", 1))

    def expect_refused(self, cancel):
        self.expect_run(
            "failed",
            name=("success", 1),
            submit=("failed", 1),
            wait=("upstream_failed", 0),
            cancel=cancel,
            run_safe=("failed", 1),
        )
        self.expect_tasks()

    def outage(self):
        """Each way finds the service gone while it waits for its task, which runs on."""
        self.write_gated_hello()
        run = self.dags_test()
        for way, sign in (("run_safe", "trying again in"), ("name", "Sensor poke failed")):
            until(f"the task of {way} runs", lambda: self.service.status_of(way) == "running")
            self.service.kill()
            until(f"{way} meets the outage", lambda: sign in run.output())
            self.service.start()
            self.open_gate(way)
        expect("exit code", run.wait(), 0)
        self.expect_success()
        for way in ("name", "run_safe"):
            # It ran on meanwhile, and not a second time.
            log = self.service.log_of(way).splitlines()
            printed = [line for line in log if not line.startswith("[task-runner]")]
            expect("its log", printed, ["begun", "ended"])

    def lost_answers(self):
        """`submit` fails, since no answer arrives; the task that it started is cancelled."""
        self.write_gated_hello()
        self.open_gate("run_safe")
        # As shipped it would give up after a quarter of an hour.
        policy = self.airflow.home / "config/airflow_local_settings.py"
        policy.parent.mkdir(exist_ok=True)
        policy.write_text(
            "from datetime import timedelta\n"
            "def task_policy(task):\n"
            "    task.retries, task.retry_delay = min(task.retries, 2), timedelta(0)\n"
        )
        proxy = LosesAnswers(self.service)
        proxy.breaks.set()
        try:
            run = self.dags_test(env=self.airflow.connection(proxy.url, TOKEN))
            expect("exit code", run.wait(), 1)
        finally:
            proxy.end()
            policy.unlink()
        expect("lost answers", proxy.withheld, 3)
        self.expect_run(
            "failed",
            name=("success", 1),
            submit=("failed", 3),
            wait=("upstream_failed", 0),
            cancel=("success", 1),
            run_safe=("success", 1),
        )
        self.expect_tasks(
            name=("cancelled", "cancelled"), run_safe=("succeeded", "completed")
        )

    def marked_failed(self):
        """Somebody marks a run as failed while one of its tasks is at work, whichever."""
        self.write_gated_hello()
        proxy = LosesAnswers(self.service)
        try:
            env = self.airflow.connection(proxy.url, TOKEN)
            for program in self.airflow.programs():
                self.start(*program, env=env)
                if program[0] == "api-server":
                    # The scheduler gives up tasks that cannot reach it.
                    until("the API server listens", self.airflow.listens)
            until("the scheduler knows the DAG", self.airflow.knows_dag)
            for at_work, way, state in (
                ("run_safe", "run_safe", "running"),
                ("wait", "name", "up_for_reschedule"),
                ("submit", "name", "running"),
            ):
                proxy.withholds = at_work == "submit"
                run_id = f"marked-{at_work}"
                self.airflow.trigger(run_id)
                until(f"the task of {way} runs", lambda: self.service.status_of(way) == "running")
                until(f"{at_work} is {state}", lambda: self.airflow.state_of(at_work) == state)
                self.airflow.mark_failed(run_id)
                until("it is cancelled", lambda: self.service.status_of(way) == "cancelled")
                # Airflow calls the last run a success:
                # https://github.com/apache/airflow/issues/57061
                until("the run ends", lambda: self.airflow.newest_run()[0] != "running")
                ended = (self.airflow.state_of(at_work), self.airflow.state_of("cancel"))
                expect(f"{at_work} and cancel", ended, ("failed", "success"))
                self.service.expect_no_worker()
                self.service.next_case()
                self.open_gate("run_safe")
        finally:
            proxy.end()


def witness(version, folder):
    begin = time.monotonic()
    service = Service(folder)
    try:
        it = Witness(folder, service, Airflow(version, Path(sys.executable).parent, folder, service))
        print(f"airflow {version}: set up: {time.monotonic() - begin:.1f} s", flush=True)
        for name, run in (
            ("the DAG succeeds as shipped", it.success),
            ("a script that fails fails the run at once", it.failure),
            ("an invalid request is refused at once", it.invalid),
            ("a wrong token is refused at once", it.unauthorized),
            ("an outage costs no task", it.outage),
            ("lost answers to submit leave no worker", it.lost_answers),
            ("a run marked as failed leaves no worker", it.marked_failed),
        ):
            with it.case(name):
                run()
    finally:
        service.end()


def main():
    # Whoever is terminated cleans up as well.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="task-runner-airflow-") as folder:
            witness(version_of("apache-airflow"), Path(folder))
    except (Wrong, subprocess.SubprocessError) as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
