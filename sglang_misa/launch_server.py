"""Start SGLang's own server with `--misa-*` flags: python -m sglang_misa.launch_server [--misa-…] [SGLang's flags].

Everything that can be refused is refused here, before SGLang is imported: exit status 2 and one sentence a mistake.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_misa import config as misa
from sglang_misa.config import ConfigError, MisaConfig
from sglang_misa.cpu import ENV as CPU_ENV

PLUGIN = "misa"  # our entry point in SGLang's group, the name SGLANG_PLUGINS lists
REFUSED = 2


def main(argv: Sequence[str]) -> int:
    """Run the server, or the demo, until it ends; returns the exit status."""
    ours, rest = _parser().parse_known_args(argv)
    try:
        misa.reject_unknown_flags(rest)
        chosen = misa.from_flags(ours) or MisaConfig.from_env()
        theirs = _peek(rest)
        if ours.demo:
            _check_free(theirs.host, theirs.port)
            from sglang_misa import demo

            return demo.run(chosen, rest, theirs.port, ours.demo_report)
        _check(chosen, theirs)
        arguments = [*rest, *_keys(ours)]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    if chosen is not None:
        os.environ[misa.ENV] = chosen.to_json()
    if theirs.device == "cpu":
        os.environ.update({CPU_ENV: "1", "CUDA_VISIBLE_DEVICES": ""})
    _serve(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.launch_server",
        description="SGLang's server with MISA token selection. Without a --misa-* flag it is stock SGLang.",
        epilog="Every other flag is SGLang's and goes to it untouched: see python -m sglang.launch_server --help.",
        allow_abbrev=False,
    )
    misa.add_cli_flags(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--api-key-file", metavar="FILE", help="SGLang's --api-key, read from a file: not seen in ps")
    server.add_argument("--admin-api-key-file", metavar="FILE", help="the same for SGLang's --admin-api-key")
    demo = parser.add_argument_group("demo")
    demo.add_argument("--demo", action="store_true", help="serve a tiny random model and measure MISA on it")
    demo.add_argument("--demo-report", metavar="FILE", type=Path, help="write what the demo measured as JSON")
    return parser


def _peek(words: Sequence[str]) -> argparse.Namespace:
    """The few SGLang flags that are checked here; all stay in the words SGLang gets."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--json-model-override-args", default="{}")
    parser.add_argument("--device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise ConfigError([str(error)]) from None


def _check(chosen: MisaConfig | None, theirs: argparse.Namespace) -> None:
    """Raise ConfigError for what is known to fail: plugin list, model folder, policy against model, port."""
    plugins = os.environ.get("SGLANG_PLUGINS", "")
    if chosen is not None and plugins and PLUGIN not in (name.strip() for name in plugins.split(",")):
        raise ConfigError([f"SGLANG_PLUGINS: expected a list with {PLUGIN}, got {plugins!r}; add {PLUGIN} or unset it"])
    model = _model_config(theirs)
    if chosen is not None and model is not None:
        if "index_topk" not in model:
            got = ", ".join(model.get("architectures", ["no architecture"]))
            raise ConfigError(
                [
                    f"{theirs.model_path}: expected a DeepSeek Sparse Attention model (index_topk in its config.json), "
                    f"got {got}; drop the --misa-* flags to serve it with stock SGLang"
                ]
            )
        chosen.check(index_heads=model.get("index_n_heads"), topk=model["index_topk"])
    _check_free(theirs.host, theirs.port)


def _model_config(theirs: argparse.Namespace) -> Mapping[str, Any] | None:
    """config.json of a local model folder with SGLang's overrides, or None where the path names a remote model."""
    if theirs.model_path is None:
        return None
    folder = Path(theirs.model_path).expanduser()
    file = folder / "config.json"
    if not folder.is_dir():
        if theirs.model_path.count("/") == 1 and not theirs.model_path.startswith((".", "/", "~")):
            return None  # the form of a Hugging Face name
        raise ConfigError([f"--model-path: expected a model folder, got {theirs.model_path}, which is none"])
    if not file.is_file():
        raise ConfigError([f"--model-path: expected a folder with config.json, got {theirs.model_path} without it"])
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
        model.update(model.get("text_config", {}))
        model.update(json.loads(theirs.json_model_override_args))
    except (json.JSONDecodeError, OSError) as error:
        raise ConfigError(
            [f"{file}: expected a JSON object, with --json-model-override-args another ({error})"]
        ) from None
    return model  # type: ignore[no-any-return]


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                [f"--port: expected a free port on {host}, got {port} ({error.strerror}); choose another"]
            ) from None


def _keys(ours: argparse.Namespace) -> list[str]:
    """SGLang's key flags, with the keys read from their files."""
    words = []
    for flag, path in (("--api-key", ours.api_key_file), ("--admin-api-key", ours.admin_api_key_file)):
        if path is None:
            continue
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError([f"{flag}-file: expected a readable file, got {path} ({error.strerror})"]) from None
        if not key or key != "".join(key.split()):
            raise ConfigError(
                [f"{flag}-file: expected one key in {path}, got {'nothing' if not key else 'several words'}"]
            )
        words.append(f"{flag}={key}")
    return words


def _serve(arguments: Sequence[str]) -> None:
    """SGLang's own launch, as `python -m sglang.launch_server` does it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(list(arguments)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":  # SGLang's children import this module again
    sys.exit(main(sys.argv[1:]))
