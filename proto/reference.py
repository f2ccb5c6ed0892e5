#!/usr/bin/env python3
"""Makes docs/api.md of the comments in the proto files. With --check it only says whether the
document is up to date. Needs protoc and the Python package protobuf."""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

from google.protobuf import descriptor_pb2

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "api.md"
# In the order in which a client meets them. Lanes are for the client libraries alone.
FILES = [f"kvservice/v1/{name}.proto" for name in
         ("model", "sequence", "attention", "admin", "types", "error_details", "lane")]
HEAD = """# API

Made from the comments in `proto/kvservice/v1` by `proto/reference.py`; do not edit.

Every call may end with a canonical gRPC code whose details carry a stable reason (`ErrorInfo`), the
field to blame (`BadRequest`) and, where repeating helps, a delay (`RetryInfo`). A failed call
changes nothing. Fields that are absent mean their zero unless they say otherwise.
"""
TYPES = {number: name[5:].lower() for name, number
         in descriptor_pb2.FieldDescriptorProto.Type.items()}
REPEATED = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
# Field numbers of descriptor.proto, of which paths to comments are made.
MESSAGE, NESTED, FIELD, ENUM, VALUE, SERVICE, METHOD, IN_MESSAGE_ENUM = 4, 3, 2, 5, 2, 6, 2, 4


def read_files():
    """The descriptors of all files, with their comments."""
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(["protoc", f"--proto_path={ROOT / 'proto'}", "--include_source_info",
                        f"--descriptor_set_out={out.name}", *FILES], check=True)
        found = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(out.name).read_bytes())
    by_name = {file.name: file for file in found.file}
    return [by_name[name] for name in FILES]


class Comments:
    """Comments of one file by the path of what they belong to."""

    def __init__(self, file):
        self._at = {tuple(place.path): place for place in file.source_code_info.location}

    def of(self, *path):
        place = self._at.get(path)
        if place is None:
            return ""
        text = place.leading_comments or place.trailing_comments
        return "\n".join(line[1:] if line.startswith(" ") else line
                         for line in text.rstrip("\n").split("\n"))

    def head(self, file):
        """What a file says at its top."""
        place = self._at.get((12,))  # the syntax line
        parts = [] if place is None else [*place.leading_detached_comments, place.leading_comments]
        text = "\n".join(part for part in parts if part)
        return "\n".join(line.strip() for line in text.split("\n")).strip() or file.name


def cell(text):
    """One line of a table."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;").strip()


def anchor(name):
    return name.lower().replace(".", "")


def link(type_name):
    short = type_name.removeprefix(".kvservice.v1.")
    if short == type_name:
        return type_name.removeprefix(".")
    return f"[{short}](#{anchor(short)})"


def is_map(message):
    return message.options.map_entry


def type_of(field, maps):
    name = TYPES[field.type]
    if field.type_name in maps:
        entry = maps[field.type_name]
        return f"map of {type_of(entry.field[0], maps)} to {type_of(entry.field[1], maps)}"
    if field.type_name:
        name = link(field.type_name)
    prefix = "repeated " if field.label == REPEATED else ""
    return prefix + ("optional " if field.proto3_optional else "") + name


def enum_lines(enum, name, comments, path):
    yield f"### {name}\n"
    if text := comments.of(*path):
        yield text + "\n"
    yield "| value | number | |\n|---|---|---|"
    for index, value in enumerate(enum.value):
        yield f"| {value.name} | {value.number} | {cell(comments.of(*path, VALUE, index))} |"
    yield ""


def message_lines(message, name, comments, path, scope):
    maps = {f"{scope}.{message.name}.{nested.name}": nested for nested in message.nested_type
            if is_map(nested)}
    yield f"### {name}\n"
    if text := comments.of(*path):
        yield text + "\n"
    if message.field:
        yield "| field | number | type | |\n|---|---|---|---|"
    for index, field in enumerate(message.field):
        oneof = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            oneof = f"One of `{message.oneof_decl[field.oneof_index].name}`. "
        yield (f"| {field.name} | {field.number} | {type_of(field, maps)} "
               f"| {cell(oneof + comments.of(*path, FIELD, index))} |")
    yield ""
    for index, enum in enumerate(message.enum_type):
        yield from enum_lines(enum, f"{name}.{enum.name}", comments,
                              (*path, IN_MESSAGE_ENUM, index))
    for index, nested in enumerate(message.nested_type):
        if not is_map(nested):
            yield from message_lines(nested, f"{name}.{nested.name}", comments,
                                     (*path, NESTED, index), f"{scope}.{message.name}")


def service_lines(service, comments, path):
    yield f"### {service.name}\n"
    if text := comments.of(*path):
        yield text + "\n"
    yield "| call | request | response | |\n|---|---|---|---|"
    for index, method in enumerate(service.method):
        request = ("stream of " if method.client_streaming else "") + link(method.input_type)
        response = ("stream of " if method.server_streaming else "") + link(method.output_type)
        text = cell(comments.of(*path, METHOD, index))
        yield f"| **{method.name}** | {request} | {response} | {text} |"
    yield ""


def document(files):
    lines = [HEAD]
    for file in files:
        comments = Comments(file)
        lines += [f"## {file.name}\n", comments.head(file) + "\n"]
        for index, service in enumerate(file.service):
            lines += service_lines(service, comments, (SERVICE, index))
        for index, message in enumerate(file.message_type):
            lines += message_lines(message, message.name, comments, (MESSAGE, index),
                                   ".kvservice.v1")
        for index, enum in enumerate(file.enum_type):
            lines += enum_lines(enum, enum.name, comments, (ENUM, index))
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it would")
    arguments = parser.parse_args()
    text = document(read_files())
    if not arguments.check:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif DOCUMENT.read_text(encoding="utf-8") != text:
        sys.exit("docs/api.md is not what proto/reference.py makes of the proto files: run it")


if __name__ == "__main__":
    main()
