"How many trials a command survived: printed and, with RTSSEG_RECORD or in the long form, kept for the page of faults"
import json
import os
from pathlib import Path

RECORD = Path(__file__).parents[1]/'faults'/'soak.json'

IS_LONG = 'RTSSEG_SOAK' in os.environ

# in the long form there are so many times as many trials
LONG = int(os.environ.get('RTSSEG_SOAK', 1))

def note(kind, name, survived, of):
    "Print how many trials of a kind were survived, and keep it where that is asked for"
    print(f'{kind}: {name}: {survived} of {of}')
    if IS_LONG or os.environ.get('RTSSEG_RECORD'):
        found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        found.setdefault(kind, {})[name] = [survived, of]
        RECORD.write_text(json.dumps(found, indent=1) + '\n')
