"Odd values, and files of known structure that are changed in some places"
import copy
import io
import json
import sqlite3
from contextlib import suppress

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

ODD_TEXTS = [
    '', ' ', 'nan', 'NaN', 'None', 'null', 'true', '-1', '0', '1e999', '1:20', '٣', '\x00', '\ud800', '\u202egnp.exe',
    '<script>alert(1)</script>', "'; DROP TABLE x; --", '../../../etc/passwd', '/etc/passwd', 'C:\\x', '~', '.', '..',
    'http://127.0.0.1:9/x.tif', '/vsicurl/http://127.0.0.1:9/x.tif', '!!python/object:os.system', '{x}', '%s',
    'a' * 10_000, 'train', 'EPSG:4326', 'EPSG:5773', 'EPSG:99999', 'LOCAL_CS["x"]', '2024-13-45',
]
ODD_NUMBERS = [0, -1, 1, 2, 1.5, -0., 1e-300, 1e308, 2**31, 2**63, 10**400, float('nan'), float('inf'), -float('inf')]
ODD_TREES = [None, True, False, [], {}, [[]], [None], {'': None}, [1, 'a'], {'a': {'b': {}}}, [[[[[[[[[]]]]]]]]]]

texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
values = st.sampled_from(ODD_NUMBERS) | texts | st.sampled_from(ODD_TREES) | st.integers() | st.floats()

# ---------------------------------------------------------------- trees, as JSON and YAML hold them

def places(tree, path=()):
    "The paths of all nodes of a tree but its root"
    found = []
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += [(*path, key), *places(value, (*path, key))]
    return found

def change_tree(draw, tree):
    "Change one node: another value, none, another name, twice"
    found = places(tree)
    if not found:
        return
    *parents, key = draw(st.sampled_from(found))
    for parent in parents:
        tree = tree[parent]
    action = draw(st.sampled_from(['replace', 'replace', 'remove', 'rename', 'double']))
    if action == 'replace':
        tree[key] = copy.deepcopy(draw(values))
    elif action == 'remove':
        del tree[key]
    elif isinstance(tree, dict):
        tree[draw(texts)] = tree[key] if action == 'double' else tree.pop(key)
    else:
        tree.insert(key, copy.deepcopy(tree[key]))

@st.composite
def changed_trees(draw, tree):
    "A tree of which some nodes were changed"
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        change_tree(draw, tree)
    return tree

def as_json(tree):
    "Bytes of JSON, with what Python writes beyond the standard"
    return json.dumps(tree).encode('utf-8', 'surrogatepass')

# ---------------------------------------------------------------- bytes

@st.composite
def changed_bytes(draw, data):
    "Bytes of which some were changed, cut off or put in"
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(['flip', 'cut', 'insert']))
        if action == 'flip' and data:
            data[at] ^= draw(st.integers(1, 255))
        elif action == 'cut':
            del data[at:at + draw(st.sampled_from([1, 100, 10**6]))]
        else:
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b'\x00', b'\xff\xfe', b'"', b'\n', b',' * 50]))
    return bytes(data)

# ---------------------------------------------------------------- tables

def change_cells(draw, table):
    "Other values in some cells, other columns and rows; the table"
    table = table.astype(object)
    for _ in range(draw(st.integers(1, 4))):
        columns, column = list(table.columns), draw(st.sampled_from(list(table.columns)))
        action = draw(st.sampled_from(['cell', 'cell', 'cell', 'column', 'drop', 'rename', 'double', 'rows']))
        at = columns.index(column)
        if action == 'cell' and len(table):
            table.iat[draw(st.integers(0, len(table) - 1)), at] = draw(values.map(str) | values)
        elif action == 'column':
            value = draw(values)
            table.isetitem(at, pd.Series([value] * len(table), index=table.index, dtype=object))
        elif action == 'drop' and len(columns) > 1:
            table = table.iloc[:, [i for i in range(len(columns)) if i != at]]
        elif action == 'rename':
            columns[at] = draw(texts)
            # pandas would refuse half of a character in names that are texts
            table = table.set_axis(pd.Index(columns, dtype=object), axis=1)
        elif action == 'double':
            table = pd.concat([table, table.iloc[:, [at]]], axis=1)
        else:
            rows = draw(st.lists(st.integers(0, max(len(table) - 1, 0)), max_size=8))
            table = table.iloc[rows if len(table) else []]
    return table

KINDS = [pa.int8(), pa.float32(), pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.date32(),
         pa.timestamp('ns', 'UTC'), pa.list_(pa.string()), pa.decimal128(9, 2), pa.dictionary(pa.int8(), pa.string()),
         pa.null()]

def arrow_column(draw, column):
    "Values as a column of Parquet: as they are, as text where they have no common type, or of an odd type"
    kinds = [draw(st.sampled_from([None, None, None, *KINDS])), None, pa.string()]
    texts_of = [None if value is None else str(value) for value in column]
    for kind in kinds:
        for found in (list(column), texts_of):
            with suppress(pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
                array = pa.array(found, kind, from_pandas=True)
                # a struct without fields cannot be written
                pq.write_table(pa.table(dict(column=array)), io.BytesIO())
                return array
    return pa.array([None] * len(column))

def write_parquet(draw, table, path):
    "Write a changed table as Parquet, with types of its own"
    columns = [arrow_column(draw, table.iloc[:, i].tolist()) for i in range(table.shape[1])]
    names = [name.encode('utf-8', 'replace').decode() for name in map(str, table.columns)]
    pq.write_table(pa.table(columns, names=names), path)

def write_csv(draw, table, path):
    "Write a changed table as CSV, and change bytes of that"
    text = table.to_csv(index=False).encode('utf-8', 'surrogatepass')
    path.write_bytes(draw(changed_bytes(text)))

def change_database(draw, path):
    "Change cells, rows and tables of a GeoPackage, those that describe the layer too"
    with sqlite3.connect(path) as base:
        base.execute('PRAGMA synchronous = OFF')
        found = [row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        # those of the index belong together
        tables = [name for name in found if not name.startswith('rtree_')]
        for trigger, in base.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            base.execute(f'DROP TRIGGER "{trigger}"')
        for _ in range(draw(st.integers(1, 3))):
            table = draw(st.sampled_from(tables))
            columns = [row[1] for row in base.execute(f'PRAGMA table_info("{table}")')]
            if not columns:
                continue
            action = draw(st.sampled_from(['set', 'set', 'set', 'delete', 'drop']))
            value = draw(st.sampled_from(ODD_NUMBERS[:9]) | st.text(max_size=8).map(clean) | st.binary(max_size=40)
                         | st.sampled_from(ODD_TEXTS).map(clean) | st.none())
            if action == 'set':
                column = draw(st.sampled_from(columns))
                run(base, f'UPDATE OR IGNORE "{table}" SET "{column}" = ?', [value])
            elif action == 'delete':
                run(base, f'DELETE FROM "{table}"', [])
            elif not table.startswith('sqlite_'):
                run(base, f'DROP TABLE IF EXISTS "{table}"', [])
    base.close()

def clean(text):
    "Text that SQLite takes"
    return text.encode('utf-8', 'replace').decode()

def run(base, command, arguments):
    "What the rules of a table refuse stays as it is"
    try:
        base.execute(command, arguments)
    except (sqlite3.Error, OverflowError):
        pass
