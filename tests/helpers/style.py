"What plain code looks like, by the syntax tree: each rule finds its violations in a piece of source"
import ast
import io
import json
import re
import tokenize
from pathlib import Path

MAX_COLUMNS = 120
MAX_COMMENT_COLUMNS = 100
MAX_LINES = 50

WORDS = (Path(__file__).parent/'odd_words.txt').read_text().split('\n')
ODD_WORDS = re.compile(rf'\b({"|".join(word for word in WORDS if word)})\b', re.IGNORECASE)

def wide_lines(source):
    "Lines of more than 120 columns, comments on their own line of more than 100"
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > MAX_COLUMNS:
            yield number, f'{len(line)} columns (at most {MAX_COLUMNS})'
        elif re.match(r'\s*#(?!\|)', line) and len(line) > MAX_COMMENT_COLUMNS:
            yield number, f'a comment of {len(line)} columns (at most {MAX_COMMENT_COLUMNS})'

def shared_lines(tree):
    "Statements that begin on the line on which the one before them ends"
    for node in ast.walk(tree):
        for name in ('body', 'orelse', 'finalbody', 'handlers'):
            block = getattr(node, name, None)
            if isinstance(block, list):
                for first, second in zip(block, block[1:]):
                    if first.end_lineno == second.lineno:
                        yield second.lineno, 'two statements share a line'

def nested_conditionals(tree):
    "Conditional expressions inside another"
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            if any(isinstance(child, ast.IfExp) for child in ast.walk(node) if child is not node):
                yield node.lineno, 'a conditional expression inside another'

def is_condition(node):
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    is_bool = isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'bool'
    return isinstance(node, (ast.Compare, ast.BoolOp)) or is_not or is_bool

def is_text_or_list(node):
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, (ast.List, ast.JoinedStr))

def conditional_products(tree):
    "A text or a list that is multiplied by a condition"
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for condition, value in ((node.left, node.right), (node.right, node.left)):
                if is_condition(condition) and is_text_or_list(value):
                    yield node.lineno, 'a text or a list times a condition'

def early_reads(tree):
    "Names that are read on a line before a walrus on the same line writes them"
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.stmt):
            continue
        written = {}
        for node in ast.walk(statement):
            if isinstance(node, ast.NamedExpr):
                written.setdefault(node.target.id, (node.lineno, node.col_offset))
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in written:
                line, column = written[node.id]
                if node.lineno == line and node.col_offset < column:
                    yield line, f'{node.id} is read before the walrus that writes it'

def long_functions(tree):
    "Functions of more than 50 lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_LINES:
                yield node.lineno, f'{node.name} has {lines} lines (at most {MAX_LINES})'

def documented_lines(tree):
    "Lines whose trailing comment is documentation: signatures, and fields of a class"
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines |= set(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, (ast.Assign, ast.AnnAssign)):
                    lines |= set(range(field.lineno, field.end_lineno + 1))
    return lines

def trailing_comments(source, tree):
    "Comments behind code, but for those that document it"
    documented, lines = documented_lines(tree), source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        is_behind_code = token.type == tokenize.COMMENT and lines[line - 1][:column].strip()
        if is_behind_code and line not in documented and not token.string.startswith('# noqa'):
            yield line, 'a comment behind code'

def odd_words(source):
    "Words of another century in comments and texts"
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return
    for token in tokens:
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for word in ODD_WORDS.findall(token.string):
                yield token.start[0], f'the word {word!r}'

def violations(source, is_exported=False):
    "All that is not plain in a piece of source: (line, what)"
    tree = ast.parse(source)
    found = [*wide_lines(source), *shared_lines(tree), *nested_conditionals(tree), *conditional_products(tree)]
    found += [*early_reads(tree), *trailing_comments(source, tree)]
    if is_exported:
        found += long_functions(tree)
    return sorted(found)

def sources(path):
    "The pieces of Python of a file, with where each is: (where, source, whether it is exported)"
    if path.suffix == '.py':
        return [(path.name, path.read_text(), False)]
    pieces = []
    for cell in json.loads(path.read_text())['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            # papermill reads the comments behind parameters
            if 'parameters' in cell['metadata'].get('tags', ()):
                continue
            # commands of IPython are not Python
            text = re.sub(r'^[%!].*', '#', text, flags=re.MULTILINE)
            pieces.append((f'{path.name}[{cell["id"]}]', text, bool(re.search(r'^#\| *export', text, re.MULTILINE))))
    return pieces

def prose(path):
    "The Markdown of a file, with where each piece is: (where, text)"
    if path.suffix != '.ipynb':
        return [(path.name, path.read_text())]
    cells = json.loads(path.read_text())['cells']
    cells = [cell for cell in cells if cell['cell_type'] == 'markdown']
    return [(f'{path.name}[{cell["id"]}]', ''.join(cell['source'])) for cell in cells]
