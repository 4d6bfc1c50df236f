"Pages in Chromium, driven by Playwright, and pages read as a browser reads them"
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
executable = next(filter(None, map(shutil.which, NAMES)), None)

# nothing leaves the machine, not even a question for an address
FLAGS = ['--disable-gpu', '--disable-quic', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']

def in_browser(test):
    "Mark a test that needs Chromium"
    reason = 'no Chromium here: the page was not opened in a browser (.ci/run installs one where it can)'
    return pytest.mark.browser(pytest.mark.skipif(not executable, reason=reason)(test))

@contextmanager
def launched():
    "A browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()

@contextmanager
def kept_browser(folder, width=1366, height=768):
    "A page of a browser with a profile in a folder; opened again there, it knows what it had saved"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder/'profile', executable_path=executable, args=FLAGS, viewport=dict(width=width, height=height))
        yield context.pages[0]
        context.close()

@contextmanager
def opened(chromium, path, width=1280, anchor=''):
    "A page of a file in a window of a width. `page.asked` are the addresses that it asked for: each is refused"
    context = chromium.new_context(viewport=dict(width=width, height=900))
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on('pageerror', lambda error: page.errors.append(error))

    def refuse(route):
        page.asked.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith(('file:', 'data:', 'blob:')), refuse)
    page.goto(path.as_uri() + anchor)
    yield page
    context.close()

# of those that axe-core knows: what keeps somebody from using a page
GRAVE = ('serious', 'critical')

def accessibility(page):
    "What axe-core finds grave about a page: [(rule, why, a few of the elements)]"
    found = Axe().run(page).response['violations']
    return [(each['id'], each['help'], [node['html'][:120] for node in each['nodes'][:3]])
            for each in found if each['impact'] in GRAVE]

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
