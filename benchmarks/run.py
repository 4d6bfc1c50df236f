"""Run the benchmarks, keep their JSON lines in results.jsonl, and write the table of README.md from them

    python benchmarks/run.py [script …]       all scripts, where none is named
    python benchmarks/run.py --table          only the table

The lines of a script replace those of its last run. A script that fails or is skipped keeps its old lines.
"""
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE/'results.jsonl', HERE/'README.md'
SCRIPTS = ['step', 'ema', 'normalisation', 'augment', 'photos', 'loader', 'series', 'boundary', 'pixels', 'objects',
           'bootstrap', 'evaluate', 'checkpoint', 'tracker', 'polygons', 'inference', 'memory', 'fleet', 'fleet_ray',
           'compiled', 'gpu', 'classes', 'distil', 'landcover', 'plants', 'survival', 'risk', 'timeseries', 'quality']
START, END = '<!-- results -->', '<!-- end of results -->'
COLUMNS = ['what', 'unit', 'ours', 'peer', 'ratio', 'quartiles', 'goal', 'met', 'machine', 'script']

def read_results():
    "{script: its rows}"
    results = {script: [] for script in SCRIPTS}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            row = json.loads(line)
            results[row['script']].append(row)
    return results

def write_results(results):
    lines = [json.dumps(row, ensure_ascii=False) for rows in results.values() for row in rows]
    RESULTS.write_text('\n'.join(lines) + '\n')

def run(script):
    "Rows that a script prints, shown as they come; none where it fails or is skipped"
    print(f'{script} …', flush=True)
    rows = []
    with subprocess.Popen([sys.executable, HERE/f'{script}.py'], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            if line.startswith('{'):
                rows.append({'script': script, **json.loads(line)})
    if process.returncode:
        print(f'{script}: exit code {process.returncode}, its old results stay')
        return []
    return rows

def number(value, unit):
    "A number with its unit, or a dash"
    if value is None:
        return '–'
    if unit == 'ms' and value >= 1000:
        return f'{value/1000:,.3g} s'
    return f'{value:,} {unit}'.strip()

def goal(row):
    "The goal, and whether it is met"
    if 'goal' not in row:
        return ''
    if 'met' not in row:
        return str(row['goal'])
    return f"{row['goal']}: {'met' if row['met'] else 'missed'}"

def ratio(row):
    "The ratio of the medians, and its quartiles within a round"
    if 'ratio' not in row:
        return ''
    if 'quartiles' not in row:
        return str(row['ratio'])
    low, _, high = row['quartiles']
    return f"{row['ratio']} ({low} to {high})"

def details(row):
    "What else a row holds"
    words = []
    for name, value in row.items():
        if name not in COLUMNS:
            words.append(f"{name.replace('_', ' ')}: {value}")
    return '; '.join([*words, row['machine']])

def table(results):
    "The rows as Markdown"
    lines = ['| script | what | ours | peer | ratio (quartiles) | goal | more |', '|---|---|---|---|---|---|---|']
    for script, rows in results.items():
        for row in rows:
            unit = row.get('unit', '')
            cells = [f'{script}.py', row['what'], number(row.get('ours'), unit), number(row.get('peer'), unit)]
            cells += [ratio(row), goal(row), details(row)]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)

def write_table(results):
    before, _, rest = README.read_text().partition(START)
    after = rest.partition(END)[2]
    README.write_text(f'{before}{START}\n{table(results)}\n{END}{after}')

def main(names):
    results = read_results()
    for script in names:
        rows = run(script)
        if rows:
            results[script] = rows
            write_results(results)
    write_table(results)

if __name__ == '__main__':
    if sys.argv[1:] == ['--table']:
        main([])
    else:
        main(sys.argv[1:] or SCRIPTS)
