"Ways in which a model or a run that somebody else made can lie: other bytes, other types, links, pickles"
import json
import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq

from rtsseg.evidence import evidence_path
from rtsseg.files import seal_model

class Payload:
    "An object that creates a file when it is unpickled"

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')

def change_json(path, **fields):
    "Set top-level fields of a JSON file"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

def as_bytes(content):
    "Text as UTF-8; bytes as they are"
    return content if isinstance(content, bytes) else content.encode()

def replace_sealed(model, name, content):
    "Replace a file of a model directory, and list its new digest"
    (model/name).write_bytes(as_bytes(content))
    seal_model(model, name)

def replace_by_no_file(path, kind, outside):
    "Replace a file by something that is not a regular file; a link out leads to `outside`, which gets the content"
    content = path.read_bytes() if path.exists() else b''
    path.unlink(missing_ok=True)
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'link to itself':
        path.symlink_to(path)
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    else:
        assert kind == 'link out'
        outside.write_bytes(content)
        path.symlink_to(outside)

# ------------------------------------------------ the table at the head of the weights

def weight_file(table, data=b''):
    "A safetensors file: the length of its table, the table, the numbers"
    table = as_bytes(table)
    return struct.pack('<Q', len(table)) + table + data

def change_weight_table(model, change):
    "Change the table of a model's weights: `change` edits the dict, or returns the whole text"
    content = (model/'model.safetensors').read_bytes()
    length = int.from_bytes(content[:8], 'little')
    table = json.loads(content[8:8 + length])
    text = change(table)
    if not isinstance(text, str):
        text = json.dumps(table)
    replace_sealed(model, 'model.safetensors', weight_file(text, content[8 + length:]))

# ------------------------------------------------ evidence

def change_evidence(folder, change, split='val'):
    "Rewrite the evidence of a split: `change(table, description)` returns both"
    path = evidence_path(folder, split)
    table = pq.read_table(path)
    description = json.loads(table.schema.metadata[b'rtsseg'])
    table, description = change(table, description)
    if not isinstance(description, bytes):
        description = json.dumps(description).encode()
    pq.write_table(table.replace_schema_metadata({b'rtsseg': description}), path)

def set_column(table, name, values):
    "A table with one column replaced"
    return table.set_column(table.column_names.index(name), name, values)

def column(name, change):
    "For `change_evidence`: a column replaced by `change(column)`"
    def apply(table, description):
        return set_column(table, name, change(table[name])), description
    return apply

def constant(value, kind=None):
    "For `column`: one value in every row"
    return lambda old: pa.array([value] * len(old), kind)

def lists(change):
    "For `column`: the list of each tile changed by `change(list)`"
    def apply(old):
        return pa.array([change(list(values)) for values in old.to_pylist()], old.type)
    return apply

def first_item(**fields):
    "For `column`: other fields in the first item of the first list that has one"
    def apply(old):
        rows = old.to_pylist()
        items = next(row for row in rows if row)
        items[0] = items[0] | fields
        return pa.array(rows, old.type)
    return apply

def described(**fields):
    "For `change_evidence`: other fields in the description"
    return lambda table, description: (table, description | fields)

def prefixed(prefix, *names):
    "For `change_evidence`: text columns whose values begin with `prefix`"
    def apply(table, description):
        for name in names:
            table = set_column(table, name, pa.array([prefix + value for value in table[name].to_pylist()]))
        return table, description
    return apply
