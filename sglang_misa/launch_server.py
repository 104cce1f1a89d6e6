"""Start SGLang's own server with `--misa-*` flags: python -m sglang_misa.launch_server [--misa-…] [SGLang's flags].

What can be refused is refused here, before SGLang is imported: exit status 2 and a sentence for each mistake. Later
failures are SGLang's or the plugin's: any other status but 0 says that the server did not start (or did not stay up).
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_misa import admission, check, dump_folder, flags, key_mask, preflight, supervisor, versions
from sglang_misa import config as misa
from sglang_misa.admission import AdmissionError
from sglang_misa.arguments import Parser
from sglang_misa.config import ConfigError, MisaConfig
from sglang_misa.cpu import ENV as CPU_ENV
from sglang_misa.outlet import Outlet, kept_stdout
from sglang_misa.validation import named_file, parsed_object, read_text

PLUGIN, CPU_PLATFORM = "misa", "misa_cpu"  # our entry points, by the names that SGLANG_PLUGINS and SGLANG_PLATFORM use
DEFAULT_PORT = 30000  # SGLang's
REFUSED = 2
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/davinci_manager")  # of any vendor
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # of this machine
SIZES = ("index_topk", "index_n_heads", "index_head_dim", "num_hidden_layers")


def main(argv: Sequence[str]) -> int:
    """Run the server, the demo or the check until it ends; returns the exit status."""
    try:
        ours, rest = _parser().parse_known_args(argv)
        flags.reject_unknown_flags(rest)
        from_flags = flags.from_flags(ours)
        ConfigError.raise_if(_both_problems(from_flags))
        chosen = from_flags or MisaConfig.from_env()
        ConfigError.raise_if(_unread_problems(rest))
        theirs = _peek(rest)
        ConfigError.raise_if(_key_problems(ours, rest))
        keys = _keys(ours)
        port = [*_port_number_problems(theirs)]
        unreachable = [*port, *_host_problems(theirs.host, "--api-key" in keys or theirs.api_key or ours.no_api_key)]
        if ours.check and ours.demo:
            raise ConfigError(["--check: expected no --demo, which brings its model and flags, got both; drop one"])
        if ours.demo_report is not None and not ours.demo:
            raise ConfigError(["--demo-report: expected --demo with it, which writes the report, got none; add it"])
        if ours.check:
            return _check(chosen, rest, theirs, unreachable)
        ConfigError.raise_if([*unreachable, *([] if port else _port_problems(theirs))])
        if ours.demo:
            return _demo(chosen, rest, theirs, ours, keys)
        with supervisor.stoppable():
            ConfigError.raise_if(_launch_problems(chosen, rest, theirs))
            if theirs.device == "cpu" and os.environ.get("SGLANG_PLATFORM", "") in ("", CPU_PLATFORM):
                ConfigError.raise_if(_cpu_problems())
                os.environ.update({CPU_ENV: "1", "SGLANG_PLATFORM": CPU_PLATFORM})
            if from_flags is not None:
                os.environ[misa.ENV] = from_flags.to_json()
            arguments = [*rest, *(f"{flag}={key}" for flag, key in keys.items())]
            return supervisor.run(lambda: _serve(arguments, open_to_all=ours.no_api_key), key_mask.given(arguments))
    except ConfigError as error:
        print(error, file=Outlet(sys.stderr))
        return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sglang_misa.launch_server",
        description="SGLang's server with the token selection of sglang-misa. Without --misa-* flags and "
        "SGLANG_MISA_CONFIG it is stock SGLang.",
        epilog="Every other flag is SGLang's and goes to it untouched: see python -m sglang.launch_server --help. "
        "--device cpu serves on a machine without a GPU, for demos and tests.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=versions.here())
    flags.add_cli_flags(parser)
    keys = parser.add_argument_group("keys")
    keys.add_argument(
        "--api-key-file", metavar="FILE", help="SGLang's --api-key, read from a file, so that ps does not show it"
    )
    keys.add_argument("--admin-api-key-file", metavar="FILE", help="the same for SGLang's --admin-api-key")
    keys.add_argument("--no-api-key", action="store_true", help="allow other machines to use the server without a key")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print what would run, its memory and every reason against it; load no weights",
    )
    demo = parser.add_argument_group("demo")
    demo.add_argument(
        "--demo",
        action="store_true",
        help="ask a small trained model on the CPU for hidden facts, under stock DSA and a preset; then serve it",
    )
    demo.add_argument("--demo-report", metavar="DIR", help="write a page with pictures and JSON to this folder")
    return parser


@kept_stdout()
def _check(chosen: MisaConfig | None, rest: Sequence[str], theirs: argparse.Namespace, problems: Sequence[str]) -> int:
    """Print what would run; returns REFUSED where something speaks against it, beside the `problems` found so far."""
    would_run, found = check.report(chosen, _model_config(theirs), theirs.device, rest)
    print(would_run)
    problems = [*problems, *_word_problems(theirs, weights=False), *found]
    problems += [*_environment_problems(os.environ), *_kernel_problems(chosen, theirs)]
    print("\n" + str(AdmissionError(problems)) if problems else "\nNo reason against this launch was found.")
    return REFUSED if problems else 0


def _demo(
    chosen: MisaConfig | None,
    rest: list[str],
    theirs: argparse.Namespace,
    ours: argparse.Namespace,
    keys: Mapping[str, str],
) -> int:
    if theirs.model_path is not None:
        raise ConfigError(["--model-path: expected none, as --demo brings its model; drop one of the two"])
    if theirs.device not in (None, "cpu"):
        raise ConfigError([f"--device: expected cpu or none, as --demo serves there, got {theirs.device}; drop it"])
    report = None if ours.demo_report is None else named_file("--demo-report", ours.demo_report)
    from sglang_misa import demo

    files = (f"{flag}-file={path}" for flag, path in _key_files(ours).items())
    words = [*rest, *files, *["--no-api-key"] * ours.no_api_key]
    key = keys.get("--api-key", theirs.api_key)
    return demo.run(chosen, words, theirs.host, theirs.port or DEFAULT_PORT, key, report)


def _unread_problems(words: Sequence[str]) -> Iterator[str]:
    """Sentences for words that SGLang would read otherwise than they are read here."""
    for name in dict.fromkeys(word.partition("=")[0] for word in words):
        meant = [flag for flag in sorted(check.READ) if len(name) > 2 and flag.startswith(name)]
        if meant and name not in check.READ:
            whole = " or ".join(meant)
            yield f"{name}: expected a whole flag, as it is read here too, got a part of {whole}; write it out"
    if any(word.startswith("--config=") for word in words):
        yield "--config: expected its file as the next word, as SGLang passes over --config=FILE; write --config FILE"


def _host_problems(host: str, allowed: object) -> Iterator[str]:
    """`allowed`: the key, or whatever else is true where other machines may reach the server."""
    if not host:
        yield "--host: expected an address, got an empty one (an unset variable?); name one, or drop it"
    elif not allowed and not _is_loopback(host):
        yield (
            f"--host: expected a key, or a loopback address, got {host} without one; add --api-key-file, or "
            "--no-api-key to serve everyone who reaches this port"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _peek(words: Sequence[str]) -> argparse.Namespace:
    """The few SGLang flags that are read here too; all stay in the words that SGLang gets. Raises ConfigError."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--load-format")
    parser.add_argument("--json-model-override-args", default="{}")
    parser.add_argument("--device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key")
    return parser.parse_known_args(words)[0]


def _port_number_problems(theirs: argparse.Namespace) -> Iterator[str]:
    if theirs.port is not None and not 0 < theirs.port < 1 << 16:
        yield f"--port: expected a number from 1 to 65535, got {theirs.port}; correct it"


def _port_problems(theirs: argparse.Namespace) -> Iterator[str]:
    if theirs.port is None and theirs.config is not None:
        return  # SGLang's own YAML file may name another
    port = DEFAULT_PORT if theirs.port is None else theirs.port
    family = socket.AF_INET6 if ":" in theirs.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((theirs.host, port))
    except (OSError, UnicodeError) as error:  # the latter for what can be no name
        if isinstance(error, (socket.gaierror, UnicodeError)) or error.errno in NO_ADDRESS:
            yield f"--host: expected an address or a name of this machine, got {theirs.host} ({error}); correct it"
        else:
            yield f"--port: expected a free one on {theirs.host}, got {port} ({error}); choose another or free it"


def _both_problems(from_flags: MisaConfig | None) -> Iterator[str]:
    if from_flags is not None and os.environ.get(misa.ENV, "").strip():
        got = os.environ[misa.ENV]
        yield f"{misa.ENV}: expected none beside --misa-* flags, got {got!r}; unset it, or drop the flags"


def _launch_problems(chosen: MisaConfig | None, rest: Sequence[str], theirs: argparse.Namespace) -> Iterator[str]:
    """What is missing for any launch, and what speaks against one with `chosen` as far as the words themselves tell."""
    model = _model_config(theirs)
    yield from _word_problems(theirs, weights=True)
    if importlib.util.find_spec("sglang") is None:
        yield "SGLang: expected it installed, got none; install sglang-misa[sglang]"
        return
    if chosen is None:
        return
    yield from _environment_problems(os.environ)
    yield from _kernel_problems(chosen, theirs)
    yield from dump_folder.holders(chosen.dump)
    if theirs.device is None and not _has_gpu():
        yield "--device: expected a GPU, or cpu for demos and tests without one, got neither; add --device cpu"
    if model is None:
        allowed = chosen.allow_unverified
        if problem := versions.problem(versions.installed(), theirs.device or "cuda", allow_unverified=allowed):
            yield problem
    else:
        yield from admission.problems(check.candidate(chosen, model, theirs.device, rest))


def _word_problems(theirs: argparse.Namespace, *, weights: bool) -> Iterator[str]:
    """Files that SGLang's flags name and that are not there; the model's `weights` too where they are needed now."""
    if theirs.model_path is None and theirs.config is None:
        yield "--model-path: expected a folder or a Hugging Face name, got none; add it"
    if theirs.config is not None and not os.path.isfile(theirs.config):
        yield f"--config: expected SGLang's YAML file, got {theirs.config}; correct the path"
    if theirs.model_path is not None and theirs.load_format is None:
        folder = Path(os.path.expanduser(theirs.model_path))
        yield from preflight.weight_problems(folder, needed=weights and os.path.isdir(folder))


def _environment_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Variables with which SGLang would leave our plugin out."""
    plugins = environ.get("SGLANG_PLUGINS", "")
    if plugins and PLUGIN not in (name.strip() for name in plugins.split(",")):
        yield f"SGLANG_PLUGINS: expected a list with {PLUGIN}, got {plugins!r}; add {PLUGIN} or unset the variable"
    platform = environ.get("SGLANG_PLATFORM", "")
    if platform not in ("", CPU_PLATFORM):
        yield (
            f"SGLANG_PLATFORM: expected none or {CPU_PLATFORM}, got {platform!r}, with which SGLang leaves out every "
            "package that brings another platform, this one too; unset it, or drop the --misa-* flags"
        )


def _kernel_problems(chosen: MisaConfig | None, theirs: argparse.Namespace) -> Iterator[str]:
    """What speaks against compiling our kernels, where there would be any; the compilers of a machine with a GPU."""
    if chosen is not None and chosen.on_kernels(theirs.device or "cuda"):
        yield from preflight.cache_problems(os.environ)
        if _has_gpu():
            yield from preflight.compiler_problems(os.environ)


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in GPU_DEVICES)


def _cpu_problems() -> Iterator[str]:
    import torch

    if torch.cuda.is_available():
        yield (
            f"--device: expected a machine without a GPU for cpu, got {torch.cuda.device_count()} of them; drop the "
            "flag, or hide them with CUDA_VISIBLE_DEVICES="
        )


def _model_config(theirs: argparse.Namespace) -> Mapping[str, Any] | None:
    """config.json of a local model folder with SGLang's overrides; None where another kind of path could be a model."""
    if theirs.model_path is None:
        return None
    override = parsed_object(theirs.json_model_override_args, "--json-model-override-args")
    folder = named_file("--model-path", theirs.model_path)
    ConfigError.raise_if(preflight.model_problems(folder))
    file = folder / "config.json"
    name = theirs.model_path.count("/") == 1 and not theirs.model_path.startswith((".", "/", "~"))
    one = folder.suffix == ".gguf" and os.path.isfile(folder)
    if one or "://" in theirs.model_path or (name and not os.path.exists(folder)):
        return None  # one file, an object store, a Hugging Face name
    if not os.path.isfile(file):
        raise ConfigError(
            [
                f"--model-path: expected a folder with config.json or a Hugging Face name (owner/model), got "
                f"{theirs.model_path}; check the path"
            ]
        )
    model = parsed_object(read_text("--model-path", file), str(file))
    text = model.get("text_config")
    found = {**model, **(text if isinstance(text, dict) else {}), **override}
    ConfigError.raise_if(
        f"{file}: expected {name} to be {what}, got {found[name]!r}; correct it"
        for names, what, holds in ((SIZES, "an int of 1 or more", _is_size), (["architectures"], "names", _are_names))
        for name in names
        if found.get(name) is not None and not holds(found[name])
    )
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _key_problems(ours: argparse.Namespace, rest: Sequence[str]) -> Iterator[str]:
    """Sentences for a key that is given twice, and for one beside the word that there is none."""
    given, files = {word.partition("=")[0] for word in rest}, _key_files(ours)
    for flag in files:
        if flag in given:
            yield f"{flag}-file: expected no {flag} beside it, got both; drop one"
    if ours.no_api_key and "--api-key" in given | files.keys():
        yield "--no-api-key: expected no key beside it, got one; drop one of the two"


def _key_files(ours: argparse.Namespace) -> dict[str, str]:
    """The key files that are given, by SGLang's flag for what they hold."""
    files = {"--api-key": ours.api_key_file, "--admin-api-key": ours.admin_api_key_file}
    return {flag: path for flag, path in files.items() if path is not None}


def _keys(ours: argparse.Namespace) -> dict[str, str]:
    """The keys in them."""
    return {flag: key_mask.read(f"{flag}-file", path) for flag, path in _key_files(ours).items()}


def _serve(arguments: Sequence[str], *, open_to_all: bool) -> None:
    """SGLang's own launch, as `python -m sglang.launch_server` does it. Exits with REFUSED where it must not be."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    app.add_middleware(key_mask.MaskArguments, keys=key_mask.given(arguments))
    try:
        resolved = prepare_server_args(list(arguments))
        ConfigError.raise_if(_resolved_problems(resolved, open_to_all))
        run_server(resolved)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _resolved_problems(resolved: Any, open_to_all: bool) -> Iterator[str]:
    """What only SGLang tells: `resolved`, its ServerArgs with what its own --config file says, and our hooks."""
    yield from _host_problems(resolved.host, resolved.api_key or open_to_all)
    if os.environ.get(misa.ENV):
        from sglang_misa.patches import register

        yield from register.problems([register.LOAD_MODEL.target])


if __name__ == "__main__":  # SGLang's children import this module again
    sys.exit(main(sys.argv[1:]))
