"""Commands on top of Hydra: composition, one-line errors, exit statuses, signals and the log.

A root script decorates `main(config)` with `command(name)`. Around Hydra's own `main` this adds: completion of the
command line (`resume=`), quoting of texts, translation of exceptions into `error: ...` lines, checks that
composition does not make, and removal of folders when nothing came of the run. Exit statuses: 0 done, 1 failed
while working, 2 a mistake in the configuration, 128 + n ended by signal n.

Nothing heavy is imported here, so that `--help` and a typo are answered in about a second.
"""

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from genai_pl import signals
from genai_pl.cli.option_help import HELP_FLAGS, help_text
from genai_pl.cli.quoting import check_flags, quote_argument
from genai_pl.cli.schema import OPEN_MAPPINGS, SCHEMAS
from genai_pl.config.redaction import redact, register_secret
from genai_pl.errors import ConfigError, TrainingError, UserError, system_error, system_line
from genai_pl.plugins import import_plugins
from genai_pl.ranks import n_started, started_by_srun
from genai_pl.training.config_errors import check_bounds, check_choices, check_types, explain_config_error
from genai_pl.training.hydra_job import is_search_job, job_overrides
from genai_pl.training.output_folders import remove_unstarted, remove_unstarted_job, reserve_folder
from genai_pl.training.resume import TYPED_ARGUMENTS
from genai_pl.training.run_log import recording
from genai_pl.training.sweeps import Outcome
from genai_pl.training.trust import CONF, names_user_code

SPINS = 1000  # 15 to 50 microseconds, by processor: about what it costs to wake a thread
RUN_NAME = re.compile(r"[^\W_][\w.+=@-]{0,99}")


def register() -> None:
    """Register resolvers and schemas with Hydra's ConfigStore; the files of conf/ refer to them by name.

    Resolvers: `${rows_of:TOKENS,SEQ_LEN}` (rows of a batch of this many tokens, at least 1), `${per_process:N}` (a
    process's part of N), `${run_folder:NAME,TIME}` and `${unused:PATH}` (a folder that did not exist).
    """
    OmegaConf.register_new_resolver("per_process", per_process, replace=True)
    OmegaConf.register_new_resolver("rows_of", lambda tokens, seq_len: max(1, tokens // seq_len), replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder_name, replace=True)
    OmegaConf.register_new_resolver("unused", reserve_folder, replace=True, use_cache=True)
    _register_schemas(ConfigStore.instance())


@cache  # once for each store, of which a process has one; Hydra hands out copies
def _register_schemas(store: ConfigStore) -> None:
    """Store the schemas of every group under `schema/`."""
    for name, schema in (*SCHEMAS.items(), *OPEN_MAPPINGS.items()):
        store.store(group="schema", name=name, node=open_mappings(schema))


def open_mappings(schema: object) -> DictConfig:
    """The schema with its empty mappings opened: keys below them are the user's (`generation.logit_bias`), all
    others must exist.
    """
    config = OmegaConf.structured(schema)
    for key in config:
        child = config._get_node(key)
        if isinstance(child, DictConfig) and child._value() == {}:
            OmegaConf.set_struct(child, False)
    return config


def per_process(total: int) -> int:
    """A process's part of a number, for steps of one size on any number of nodes; ConfigError where there is none."""
    processes = n_started()
    if processes is None:
        raise ConfigError(
            f"${{per_process:{total}}}: torchrun or srun counts the processes; without them give a number"
        )
    if total % processes:
        raise ConfigError(f"${{per_process:{total}}}: {total} cannot be divided among {processes} processes")
    return total // processes


def run_folder_name(name: str | None, time: str) -> str:
    """Last part of a run folder: the run's name, else the time, or the number of a job whose tasks all must find the same.

    ConfigError for a name that is no plain file name.
    """
    if name is None:
        return "slurm-{SLURM_JOB_ID}-{SLURM_STEP_ID}".format(**os.environ) if started_by_srun() else time
    # reserved: resume=auto is the newest run
    if name == "auto":
        raise ConfigError("run_name=auto: resume=auto and checkpoint=auto mean the newest run; take another name")
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"run_name={name}: a name is up to 100 letters, digits and . _ - + = @, and begins with a letter or digit"
        )
    return name


Main = Callable[[DictConfig], int | Outcome | None]


def command(
    config_name: str,
    prepare: Callable[[list[str]], list[str]] = list,
    *,
    own_signals: bool = False,
    records: bool = False,
    tasks: Sequence[str] = (),
) -> Callable[[Main], Callable[[], None]]:
    """Decorator that turns `main(config) -> exit status or Outcome` into a Hydra command.

    config_name: root file in conf/. prepare: rewrites the command line before Hydra reads it (train.py:
    resume). own_signals: the command installs its own signal handlers (serve.py). records: what is printed also
    goes to train.log. tasks: words with which the command line may begin (data.py), no part of what help is asked for.

    The configuration is composed inside of the handlers, so that every stage answers a mistake in the same way.
    """
    record = recording if records else nullcontext

    def handle_signals() -> AbstractContextManager[None]:
        return nullcontext() if own_signals else signals.handle_signals()

    def decorate(main: Main) -> Callable[[], None]:
        """The command of `main`: a function without arguments that reads sys.argv."""

        # one job: a single run, or one of a sweep
        def task(config: DictConfig) -> float | None:
            """Body of the Hydra job: run `main`, end the process with its status, or return the metric to a
            searching sweeper.
            """
            with handle_signals(), record():  # a launcher of Hydra may call it in a process of its own
                status, value = _run_guarded(main, config)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                remove_unstarted_job(Path(HydraConfig.get().runtime.output_dir))
            if status and not (is_search_job() and value is not None):
                sys.exit(status)  # not an Exception: Hydra lets it pass without printing
            return value

        # the process: help, plugins, completion and quoting of the command line, then Hydra
        def run() -> None:
            with handle_signals():
                start()

        def start() -> None:
            """Configure Hydra and the log, and remove unused folders whatever happens."""
            register()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
            wait_briefly()
            hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)
            try:
                with record():
                    call(hydra_main)
            finally:
                remove_unstarted()

        def call(hydra_main: Callable[[], None]) -> None:
            """Answer `--help`, or complete the command line and hand it to Hydra; every error of a user is one
            line.
            """
            try:
                if set(HELP_FLAGS) & set(sys.argv[1:]):
                    print(help_text(config_name, [word for word in sys.argv[1:] if word not in tasks]))
                    return
                # the words as Hydra is to read them: modules first, for they may define resolvers
                import_plugins(named=names_user_code(sys.argv[1:]))
                sys.argv[1:] = [quote_argument(a) for a in prepare(sys.argv[1:])]
                check_flags(sys.argv[1:])
                check_choices(sys.argv[1:], CONF)
                hydra_main()
            # errors of a user, by where they were raised: here, in Hydra, in the operating system
            except KeyboardInterrupt:
                sys.exit(130)
            except UserError as error:
                exit_with_error(str(error), error.status)
            except Exception as error:
                line = explain_config_error(error, CONF, config_name, sys.argv[1:])
                if line is None and (os_error := system_error(error)):
                    exit_with_error(name_folder_option(system_line(os_error), sys.argv[1:]), 1)
                if line is None:
                    raise
                exit_with_error(line, 2)

        return run

    return decorate


def wait_briefly() -> None:
    """Let threads that wait for each other look SPINS times and then sleep, unless the user's variables say otherwise.

    A step of the default job on two cores takes 188 ms if they sleep at once, 159 with 1,000 looks and 147 with 10,000
    (`benchmarks/threads.py`, EPYC with AVX-512). Beside one busy process or a second training the same are 283, 322 and
    634 ms: what is gained alone must not be lost many times over in company. Must come before torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ |= {"GOMP_SPINCOUNT": str(SPINS), "OMP_WAIT_POLICY": "PASSIVE"}  # the second for runtimes but GNU's


def name_folder_option(line: str, arguments: list[str]) -> str:
    """An error line about a path that the user did not type, with the option that chose it in front."""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option in ("hydra.run.dir", "hydra.sweep.dir") and line.startswith(value.strip("'\"")):
            name = "output_dir" if any(a.startswith("output_dir=") for a in TYPED_ARGUMENTS) else option
            return f"{name}={line}"
    return line


def _run_guarded(main: Main, config: DictConfig) -> Outcome:
    """Outcome of `main` on a composed configuration; errors of users, the configuration and the system become one
    line on stderr.

    Any other exception passes: it is a defect, and needs its traceback.
    """
    try:
        # checks that need the composed values, then the work
        register_environment_secrets(config)
        check_types(config, job_overrides(), CONF, HydraConfig.get().job.config_name)
        check_bounds(config)
        result = main(config)
        return result if isinstance(result, Outcome) else Outcome(result or 0)
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        # a trial of a search that diverged is one more result
        return Outcome(error.status, math.nan if isinstance(error, TrainingError) else None)
    # mistakes that show only when a value is read, an object made or a file written
    except MissingMandatoryValue as error:
        print(f"error: {error.full_key} is not set: give it on the command line", file=sys.stderr)
        return Outcome(2)
    except (HydraException, OmegaConfBaseException) as error:  # of what is composed or made later
        if (line := explain_config_error(error, CONF, HydraConfig.get().job.config_name, job_overrides())) is None:
            raise
        print(f"error: {redact(line)}", file=sys.stderr)
        return Outcome(2)
    except BrokenPipeError:  # the reader of stdout has ended: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Outcome(128 + signal.SIGPIPE)
    except Exception as error:  # what the disk, or another machine, refuses is no fault of the code
        os_error = system_error(error)
        if os_error is None:
            raise
        print(f"error: {redact(system_line(os_error))}", file=sys.stderr)
        return Outcome(1)


def register_environment_secrets(config: DictConfig) -> None:
    """Register every value that `${oc.env:NAME}` gives as a secret: messages show the reference in its place."""

    def walk(node: DictConfig | ListConfig, path: str) -> None:
        """Register the secrets of a node; `path` is its name."""
        for key in node.keys() if isinstance(node, DictConfig) else range(len(node)):
            raw = node._get_node(key)._value()
            if isinstance(raw, str) and "${oc.env:" in raw:
                register_secret(str(node[key]), raw)
            elif OmegaConf.is_config(node._get_node(key)) and isinstance(raw, dict | list):
                walk(node._get_node(key), f"{path}{key}.")

    walk(config, "")


def exit_with_error(line: str, status: int) -> None:
    """Print an `error:` line without secrets, and exit with the status."""
    print(f"error: {redact(line)}", file=sys.stderr)
    sys.exit(status)
