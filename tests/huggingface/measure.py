"""Tokens per second of a model in transformers: with its own attention, and through the service.

    PYTHONPATH=client/python:build/python build/huggingface/python tests/huggingface/measure.py

Any interpreter with torch and transformers will do (--device=cuda, --dtype=bfloat16). Prompts are
prose, cut to length; times of decoding are those after the first token.
"""

import argparse
import contextlib
import time

import torch
from transformers.utils import logging

import kvservice
from kvservice_demo.server import OwnServer
from models import smollm2

RUNS = (
    ("transformers", None, {}),
    ("dense", "dense", {}),
    ("certified .05", "certified", {"max_dropped_mass": 0.05}),
    ("certified .2", "certified", {"max_dropped_mass": 0.2}),
    ("cpe", "cpe", {}),
)


class Times:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.seconds = []

    def put(self, value):
        self.seconds.append(time.perf_counter())

    def end(self):
        """Nothing to do."""


def read_prompt(tokenizer, token_count):
    with open("client/python/kvservice_demo/prompt.txt", encoding="utf-8") as file:
        ids = tokenizer.encode(file.read())
    if len(ids) < token_count:
        raise SystemExit(f"the prompt has {len(ids)} tokens")
    return torch.tensor([ids[:token_count]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--endpoint", help="of a server that runs; default: one is started")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = smollm2()
    model.to(arguments.device, getattr(torch, arguments.dtype))
    prompt = read_prompt(tokenizer, arguments.prompt_tokens).to(arguments.device)
    prompt = prompt.repeat(arguments.batch, 1)
    reports, first = [], None
    with contextlib.ExitStack() as stack:
        endpoint = arguments.endpoint or stack.enter_context(OwnServer()).endpoint
        for name, policy, limits in RUNS:
            if policy is not None:
                kvservice.attach(model, endpoint, policy, **limits)
            times = Times() if arguments.batch == 1 else None
            began = time.perf_counter()
            output = model.generate(
                prompt, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens,
                do_sample=False, streamer=times, attention_mask=torch.ones_like(prompt),
            )
            total = time.perf_counter() - began
            text = output[:, prompt.shape[1] :]
            first = text if first is None else first
            same = (text == first).float().mean()
            line = f"{name:14} {total:8.2f} s in all"
            if times is not None:
                decoding = times.seconds[-1] - times.seconds[1]
                line += f"  {(arguments.tokens - 1) / decoding:8.2f} tokens/s"
            print(f"{line}  {same:7.1%} of transformers' tokens", flush=True)
            if policy is not None:
                reports.append(str(model.kvservice.report))
                kvservice.detach(model)
    print(*reports, sep="\n\n")


if __name__ == "__main__":
    main()
