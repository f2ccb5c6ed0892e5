"""A lane's server that does what a test says, beside a real server's gRPC socket."""

import mmap
import os
import socket
import struct
import threading
from pathlib import Path

from kvservice.lane_memory import LaneShape
from kvservice.v1 import lane_pb2

HEAD = 64  # of slot 0, from the start of the memory


class ScriptedLane:
    """Opens lanes at `path` + ".lane"; calls `answer(self)` for each byte that rings.

    One connection at a time. Its gRPC socket is the real server's, so that calls have another way.
    """

    def __init__(self, folder, real_endpoint, answer):
        path = Path(folder) / "data.sock"
        path.symlink_to(real_endpoint.removeprefix("unix:"))
        self.endpoint = f"unix:{path}"
        self.opened = 0
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{path}.lane")
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def close_connection(self):
        """The client sees the end of the lane."""
        self.connection.shutdown(socket.SHUT_RDWR)

    def request_number(self):
        return struct.unpack_from("<I", self.memory, HEAD)[0]

    def reply(self, message=b"", *, code=0, offset=None):
        """Answers slot 0's call with these bytes, at the begin of its reply area or elsewhere."""
        begin = self.shape.head_bytes + self.shape.request_bytes
        at = begin if offset is None else offset
        if offset is None:
            self.memory[at : at + len(message)] = message
        struct.pack_into("<I", self.memory, HEAD + 68, code)
        struct.pack_into("<Q", self.memory, HEAD + 72, at)
        struct.pack_into("<I", self.memory, HEAD + 80, len(message))
        struct.pack_into("<I", self.memory, HEAD + 64, self.request_number())

    def _run(self):
        while True:
            try:
                self.connection, _ = self._listener.accept()
            except OSError:
                return
            with self.connection:
                self._serve()

    def _serve(self):
        message, descriptors, _, _ = socket.recv_fds(self.connection, 4096, 2)
        request = lane_pb2.OpenLaneRequest.FromString(message)
        self.shape = LaneShape(request.slot_count, request.request_bytes, request.reply_bytes)
        self.memory = mmap.mmap(descriptors[0], self.shape.bytes)
        os.close(descriptors[0])
        struct.pack_into("<I", self.memory, 0, 1)  # asleep: every call must ring
        self.opened += 1
        self.connection.send(lane_pb2.OpenLaneResponse(version=1).SerializeToString())
        while self.connection.recv(1):
            self._answer(self)
