"""A real small language model decodes with its attention in the service.

Prefills a prompt while streaming K and V of all layers into the service, then decodes once per
policy, on forks of that one sequence, and compares speed, reads and dropped mass. Every reply is
checked against exact float64 attention on this side; any bound that fails makes the exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from importlib import resources
from pathlib import Path

# A sleeping BLAS thread leaves its core to the server; by default it spins for a while after each
# product. Read once, when numpy is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from kvservice import Client, KvServiceError  # noqa: E402
from kvservice_demo.policies import (  # noqa: E402
    DEFAULT_MAX_DROPPED_MASS,
    DEFAULT_POLICIES,
    DENSE,
    SELECTORS,
    named_policy,
)
from kvservice_demo.server import OwnServer, ServerFailedError, describe_server  # noqa: E402
from kvservice_demo.session import DemoFailedError, Session  # noqa: E402
from kvservice_demo.terminal import Terminal  # noqa: E402

_DEFAULT_TOKENS = 64


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with status 2 and a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="kvservice_demo",
        description="A real small language model decodes with its attention in the service.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to say to the model")
    source.add_argument("--file", metavar="FILE", type=Path, help="read the prompt from a file")
    parser.add_argument(
        "--policy",
        action="append",
        choices=SELECTORS,
        help="policy to run beside dense; may be repeated (default: cpe and certified)",
    )
    parser.add_argument(
        "--max-dropped-mass",
        metavar="SHARE",
        type=_share,
        default=DEFAULT_MAX_DROPPED_MASS,
        help="share of attention that certified may drop per head (default: %(default)s)",
    )
    parser.add_argument(
        "--endpoint", metavar="ADDRESS", help="unix:PATH or HOST:PORT of a running server"
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=_count,
        default=_DEFAULT_TOKENS,
        help="tokens to decode (default: %(default)s)",
    )
    parser.add_argument(
        "--seed-anchors",
        action="store_true",
        help="let sampled queries of the prompt become anchors of cis and cpe: fewer steps scan, "
        "but the samples themselves do, which pays only in long answers",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results here")
    return parser.parse_args(arguments)


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        prompt = options.prompt
    elif options.file is not None:
        prompt = options.file.read_text(encoding="utf-8", errors="replace")
    else:
        packaged = resources.files("kvservice_demo").joinpath("prompt.txt")
        prompt = packaged.read_text(encoding="utf-8")
    if not prompt.strip():
        raise DemoFailedError("the prompt is empty")
    return prompt.strip()


def _run(options: argparse.Namespace, terminal: Terminal) -> bool:
    """Runs the demo; returns whether every check passed."""
    started_s = time.monotonic()
    prompt = _read_prompt(options)
    selectors = list(dict.fromkeys([DENSE, *(options.policy or DEFAULT_POLICIES)]))
    policies = [named_policy(selector, options.max_dropped_mass) for selector in selectors]
    with contextlib.ExitStack() as stack:
        if options.endpoint is not None:
            endpoint, server_text = options.endpoint, options.endpoint
        else:
            server = stack.enter_context(OwnServer())
            endpoint, server_text = server.endpoint, describe_server(server.admin_endpoint)
        client = stack.enter_context(Client(endpoint))
        terminal.line()
        terminal.line(terminal.style("KVService", "bold", "cyan") + " · a real model decodes "
                      "through the service, every reply checked")
        terminal.line()
        terminal.field("Server", server_text)
        session = Session(
            terminal, client, prompt, options.tokens, seed_anchors=options.seed_anchors
        )
        results = session.run(policies)
    results["seconds"] = round(time.monotonic() - started_s, 2)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    written = f" · {options.json}" if options.json else ""
    terminal.line(terminal.style(f"{results['seconds']:.0f} s in all{written}", "dim"))
    return results["passed"]


def main() -> int:
    """The program; returns its exit status."""
    options = parse_arguments()
    # A kill must unwind the stack too, or the demo's own server would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    terminal = Terminal()
    try:
        return 0 if _run(options, terminal) else 1
    except KeyboardInterrupt:
        terminal.write("\n")
        return 130
    except (DemoFailedError, KvServiceError, OSError, ServerFailedError) as error:
        print(f"\nkvservice_demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
