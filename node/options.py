"""Every option of `swarmd`, once: its name and its help. Imports nothing, so that --help is instant.

An option `--some-name` is also the environment variable `SWARMD_SOME_NAME` and the key `some_name` of `config.toml` in
the data dir; the command line wins over the environment, the environment over the file.
"""

from __future__ import annotations

DEFAULT_DATA_DIR = "~/.swarmd"
DEFAULT_LISTEN = "127.0.0.1:7475"
DEFAULT_LINK_PORT = 7474
DEFAULT_MODEL = "smollm2:135m"

OPTIONS: dict[str, str] = {
    "name": "This node's name as others see it. Default: the host name.",
    "data_dir": f"Where identity, models and settings are kept; one per node. Default: {DEFAULT_DATA_DIR}.",
    "listen": "HOST:PORT of the HTTP endpoint and the page. A host other than loopback demands an API key. "
    f"Default: {DEFAULT_LISTEN}, or any free port if that is taken.",
    "api_key": "Key that HTTP clients must send as 'Authorization: Bearer KEY'. Default: none on loopback; made on the "
    "spot and shown once when listening wider.",
    "port": f"Port for links with other nodes; 0 = any. Default: {DEFAULT_LINK_PORT}, or any free port if that is taken.",
    "peer": "HOST[:PORT] of another node, for networks without multicast; may be given several times.",
    "mdns": "Announce this node on the local network and look for others there (mDNS). Default: on.",
    "memory": "The most memory that models may take on this node (weights, KV cache, workspace), like 600MB or 4GB. "
    "Default: 80% of what is free at the start.",
    "device": "Which device carries layers: auto or cpu. Default: auto.",
    "threads": "CPU threads for computing. Default: the physical cores.",
    "model": f"Model to serve as soon as nobody else in the swarm does; 'none' for none. Default: {DEFAULT_MODEL}.",
    "context": "Longest sequence, in tokens, that models started by this node promise. Default: 4096, or what model "
    "and memory allow; given, it is kept to.",
    "split": "Spread models started by this node over all nodes, also when one could hold them. Default: off.",
    "wire_dtype": "How activations travel between stages: bf16, or f32 for exactness. Default: bf16.",
    "log_level": "DEBUG, INFO, WARNING or ERROR. Default: INFO.",
}


def environment_name(option: str) -> str:
    """The environment variable of an option."""
    return f"SWARMD_{option.upper()}"


def flag_name(option: str) -> str:
    """The command-line flag of an option."""
    return "--" + option.replace("_", "-")
