"""One server for all; torch with one thread, because more of them wait for each other here."""

import pytest
import torch
from transformers.utils import logging

from kvservice_demo.server import OwnServer

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(scope="session")
def server():
    with OwnServer() as running:
        yield running
