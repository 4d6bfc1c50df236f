"Pages in a browser, and pages read as a browser reads them"
import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
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

class Tab:
    "A page that is driven as a person drives it: the DevTools protocol over two pipes"

    def __init__(self, commands, answers):
        self._commands, self._answers, self._number = commands, answers, 0
        self._session = None
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self._session = self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        self.ask('Page.enable')

    def ask(self, method, **parameters):
        "Give a command, and wait for its answer; events in between are dropped"
        self._number += 1
        message = dict(id=self._number, method=method, params=parameters)
        if self._session:
            message['sessionId'] = self._session
        self._commands.write(json.dumps(message).encode() + b'\0')
        self._commands.flush()
        while True:
            found = self._read()
            if found.get('id') == self._number:
                assert 'error' not in found, found
                return found['result']

    def _read(self):
        text = bytearray()
        while (byte := self._answers.read(1)) != b'\0':
            assert byte, 'the browser ended'
            text += byte
        return json.loads(text)

    def open(self, path, ready):
        "Open a file; `ready` is an expression that is true once its script has run"
        self.ask('Page.navigate', url=path.as_uri())
        self.wait(lambda: self.value(f'document.readyState === "complete" && Boolean({ready})'))

    def value(self, expression):
        "What a JavaScript expression is"
        return self.ask('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')

    def press(self, key):
        "Press a key, as the keyboard does"
        text = dict(text=key) if len(key) == 1 else {}
        self.ask('Input.dispatchKeyEvent', type='keyDown', key=key, **text)
        self.ask('Input.dispatchKeyEvent', type='keyUp', key=key)

    def click(self, name):
        "Click into the middle of an element with an id"
        box = self.value(f'JSON.stringify(document.getElementById("{name}").getBoundingClientRect())')
        place = json.loads(box)
        at = dict(x=place['x'] + place['width'] / 2, y=place['y'] + place['height'] / 2, button='left', clickCount=1)
        for kind in ('mousePressed', 'mouseReleased'):
            self.ask('Input.dispatchMouseEvent', type=kind, **at)

    def screenshot(self, path):
        "What the window shows, as PNG"
        path.write_bytes(base64.b64decode(self.ask('Page.captureScreenshot')['data']))

    @staticmethod
    def wait(is_done, most=60):
        "Wait until something is true"
        end = time.monotonic() + most
        while not is_done():
            assert time.monotonic() < end, 'it did not happen'
            time.sleep(.02)

@contextmanager
def driven_browser(folder, size=(1366, 768)):
    "A `Tab` of Chromium with a profile and downloads in a folder; opened again there, it knows what it had saved"
    (read, commands), (answers, write) = os.pipe(), os.pipe()
    # the browser reads commands from 3 and writes answers to 4
    start = f'exec "$@" 3<&{read} 4>&{write}'
    command = [browser, *FLAGS, f'--user-data-dir={folder/"profile"}', f'--window-size={size[0]},{size[1]}',
               '--remote-debugging-pipe']
    process = subprocess.Popen(['bash', '-c', start, 'bash', *map(str, command)], pass_fds=(read, write),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(read)
    os.close(write)
    with open(commands, 'wb') as to_browser, open(answers, 'rb') as from_browser:
        tab = Tab(to_browser, from_browser)
        tab.ask('Page.setDownloadBehavior', behavior='allow', downloadPath=str(folder))
        try:
            yield tab
        finally:
            # an end by itself writes what pages have saved
            tab._session = None
            tab.ask('Browser.close')
            process.wait(60)

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
