"Pages in a browser, and pages read as a browser reads them"
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
browser = next(filter(None, map(shutil.which, NAMES)), None)

FLAGS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-extensions',
    '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars',
    '--host-resolver-rules=MAP * ~NOTFOUND',
]

def in_browser(test):
    "Mark a test that needs Chromium"
    reason = 'no Chromium here: the page was not opened in a browser (.ci/run installs one where it can)'
    return pytest.mark.browser(pytest.mark.skipif(not browser, reason=reason)(test))

def chromium(folder, *args):
    "Run Chromium with a profile in a folder; what it prints"
    command = [browser, *FLAGS, f'--user-data-dir={folder/"profile"}', *map(str, args)]
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout

def requests_of(folder, url):
    "What a page becomes, and the addresses that it (not the browser itself) asked for"
    log = folder/'net.json'
    page = chromium(folder, '--dump-dom', f'--log-net-log={log}', url)
    net = json.loads(log.read_text())
    start = net['constants']['logEventTypes']['URL_REQUEST_START_JOB']
    asked = [event['params'] for event in net['events'] if event['type'] == start and 'url' in event.get('params', {})]
    by_page = [params['url'] for params in asked if params['initiator'] != 'not an origin']
    return page, [url for url in by_page if not url.startswith(('file:', 'data:'))]

class Cells(HTMLParser):
    "Texts of table cells in order; those of a slider are left out, because Markdown has none"

    def __init__(self, text):
        super().__init__()
        self.found, self.is_open, self.depth = [], False, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if self.depth or ('class', 'slider') in attrs:
            self.depth += tag == 'div'
        elif tag in ('td', 'th'):
            self.is_open = True
            self.found.append('')

    def handle_endtag(self, tag):
        if self.depth:
            self.depth -= tag == 'div'
        elif tag in ('td', 'th'):
            self.is_open = False

    def handle_data(self, data):
        if self.is_open and not self.depth:
            self.found[-1] += data
