"""Every option of a node, once. Imports nothing heavy, so that --help is instant.

An option `--some-name` is also the environment variable `SWARMD_SOME_NAME` and the key `some_name` of `config.toml` in
the data dir; the command line wins over the environment, the environment over the file. docs/configuration.md says the
same for people.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_DATA_DIR = "~/.swarmd"
DEFAULT_LISTEN = "127.0.0.1:7475"
DEFAULT_LINK_PORT = 7474
DEFAULT_MODEL = "smollm2:135m"


class Option(NamedTuple):
    """`value` stands for the value in the help; an option without one is a switch, `--this` or `--no-this`."""

    help: str
    value: str = ""
    repeatable: bool = False


OPTIONS: dict[str, Option] = {
    "name": Option("This node's name as others see it. Default: the host name.", "NAME"),
    "data_dir": Option(
        f"Where identity, models and settings are kept; one per node. Default: {DEFAULT_DATA_DIR}.", "FOLDER"
    ),
    "listen": Option(
        "Where the HTTP endpoint and the page are. A host other than loopback demands an API key. "
        f"Default: {DEFAULT_LISTEN}, or any free port if that is taken.",
        "HOST:PORT",
    ),
    "api_key": Option(
        "Key that HTTP clients must send as 'Authorization: Bearer KEY'. Better put it into the environment or the "
        "config file: a command line is in the shell's history, and for a moment in the process list. Default: none on "
        "loopback; made on the spot and shown once when listening wider.",
        "KEY",
    ),
    "port": Option(
        f"Port for links with other nodes; 0 for any. Default: {DEFAULT_LINK_PORT}, or any free port if that is taken.",
        "PORT",
    ),
    "peer": Option(
        "Another node, for networks without multicast; may be given several times. "
        f"The port is {DEFAULT_LINK_PORT} unless given. Default: none.",
        "HOST[:PORT]",
        repeatable=True,
    ),
    "mdns": Option("Announce this node on the local network and look for others there (mDNS). Default: on."),
    "memory": Option(
        "The most memory that models may take on this node (weights, KV cache, workspace), like 600MB or 4GB: main "
        "memory, or that of each device, like cuda:0=20GB,cpu=8GB. Default: 80% of what is free at the start.",
        "SIZE",
    ),
    "device": Option(
        "Which devices carry layers: cpu, cuda:0, cuda:1, metal (a Mac's GPU), mlx-cpu (MLX on the CPU, for tests); "
        "several with commas or one by one. auto: all GPUs that can be used, and the CPU. Default: auto.",
        "DEVICE",
        repeatable=True,
    ),
    "threads": Option("CPU threads for computing. Default: the physical cores.", "COUNT"),
    "model": Option(
        "Model to serve as soon as nobody else in the swarm does: a name, the path of a GGUF file or a folder, or "
        f"'none'. Default: {DEFAULT_MODEL}.",
        "MODEL",
    ),
    "context": Option(
        "Longest sequence that models started by this node promise. Default: 4096, or what model and memory allow; "
        "given, it is kept to.",
        "TOKENS",
    ),
    "split": Option("Spread models started by this node over all nodes, also when one could hold them. Default: off."),
    "speculate": Option(
        "Guess tokens ahead from the text so far, where that pays, in the models that this node drives (it holds their "
        "first layers). The answers stay the same. Default: on."
    ),
    "draft_model": Option(
        "A small model with the vocabulary of the models that this node drives: it guesses tokens ahead for them, and "
        "takes memory here for that. A name, or the path of a GGUF file or a folder. Default: none.",
        "MODEL",
    ),
    "kernels": Option(
        "What computes: native (swarmd's own CPU kernels), torch (plain PyTorch, slower), or auto: native where it was "
        "built. Default: auto.",
        "KIND",
    ),
    "wire_dtype": Option(
        "How activations travel on this node's links between stages: f32 (exact), bf16 or f16 (half the bytes), q8 "
        "(8-bit blocks, a quarter of them), for slow links; given to the node that starts a model, on all its links. "
        "Default: auto, which is bf16 where an end computes in bf16 (GPUs), else f32.",
        "DTYPE",
    ),
    "log_level": Option("DEBUG, INFO, WARNING or ERROR. Default: INFO.", "LEVEL"),
}


def environment_name(option: str) -> str:
    """The environment variable of an option."""
    return f"SWARMD_{option.upper()}"


def flag_name(option: str) -> str:
    """The command-line flag of an option."""
    return "--" + option.replace("_", "-")
