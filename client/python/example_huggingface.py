"""A Hugging Face model decodes through a running server: MODEL ENDPOINT PROMPT."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvservice

name, endpoint, prompt = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
kvservice.attach(model, endpoint, policy="certified", max_dropped_mass=0.05)
output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=100)
print(tokenizer.decode(output[0]))
print(model.kvservice.report)
