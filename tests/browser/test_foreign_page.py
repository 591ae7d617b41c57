"""A page from elsewhere in a real browser tries everything that pages can do against the endpoint, and gets nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from support.browser import CHROMIUM, FLAGS, NEEDS_BROWSER
from support.fake_node import MODEL, FakeNode, serving
from yarl import URL

playwright = pytest.importorskip("playwright.async_api", reason="the browser tests need the package playwright")

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = [*NEEDS_BROWSER, pytest.mark.timeout(120)]

SECRET = "state-of-the-swarm"
# Newer browsers ask the user before a public page reaches loopback: that question must not do our work here.
EVIL = (
    "--host-resolver-rules=MAP evil.example 127.0.0.1",
    "--disable-features=BlockInsecurePrivateNetworkRequests,LocalNetworkAccessChecks",
)
ACTION = json.dumps({"model": MODEL})
# Each attempt ends with what the page has got to see; `attempt` turns failures into their names.
ATTEMPTS = """async ([target, body]) => {
  const json = {'Content-Type': 'application/json'};
  const attempt = async (work) => { try { return String(await work()) } catch (error) { return error.name } };
  const loads = (tag, name, path) => attempt(() => new Promise((resolve, reject) => {
    const element = document.createElement(tag);
    element.onload = () => resolve('loaded');
    element.onerror = () => reject(new TypeError('refused'));
    element[name] = target + path;
    if (tag === 'link') element.rel = 'stylesheet';
    document.body.append(element);
  }));
  const read = async (path, init) => attempt(async () => {
    const response = await fetch(target + path, init);
    return response.type + ' ' + await response.text();
  });
  const form = (type) => attempt(() => new Promise((resolve) => {
    const frame = document.createElement('iframe');
    frame.name = 'frame-' + type;
    document.body.append(frame);
    const form = document.createElement('form');
    Object.assign(form, {method: 'POST', action: target + '/api/instances', enctype: type, target: frame.name});
    const input = document.createElement('input');
    input.name = body.slice(0, -1) + ', "x": "';
    input.value = '"}';
    form.append(input);
    document.body.append(form);
    frame.onload = () => {
      try { resolve(frame.contentDocument.body.innerText) } catch (error) { resolve(error.name) }
    };
    form.submit();
  }));
  const frame = (path) => attempt(() => new Promise((resolve) => {
    const frame = document.createElement('iframe');
    frame.onload = () => {
      try { resolve(frame.contentDocument.body.innerText) } catch (error) { resolve(error.name) }
    };
    frame.src = target + path;
    document.body.append(frame);
  }));
  const opens = (make) => attempt(() => new Promise((resolve, reject) => {
    const source = make();
    source.onopen = () => resolve('open');
    source.onmessage = (message) => resolve(message.data);
    source.onerror = () => reject(new TypeError('refused'));
  }));
  return {
    read: await read('/api/swarm'),
    read_blindly: await read('/api/swarm', {mode: 'no-cors'}),
    act: await read('/api/instances', {method: 'POST', headers: json, body}),
    act_blindly: await read('/api/instances', {method: 'POST', mode: 'no-cors', body}),
    act_as_json: await read('/api/instances', {method: 'POST', mode: 'no-cors', headers: json, body}),
    act_without_referrer: await read(
      '/api/instances', {method: 'POST', mode: 'no-cors', referrerPolicy: 'no-referrer', body}),
    beacon: await attempt(() => navigator.sendBeacon(target + '/api/instances', body)),
    typed_beacon: await attempt(() => navigator.sendBeacon(
      target + '/api/instances', new Blob([body], {type: 'application/json'}))),
    form: await form('text/plain'),
    urlencoded: await form('application/x-www-form-urlencoded'),
    page_in_frame: await frame('/'),
    state_in_frame: await frame('/api/swarm'),
    image: await loads('img', 'src', '/api/swarm'),
    script: await loads('script', 'src', '/v1/models'),
    style: await loads('link', 'href', '/api/swarm'),
    own_script: await loads('script', 'src', '/assets/'),
    events: await opens(() => new EventSource(target + '/api/events')),
    socket: await opens(() => new WebSocket(target.replace('http', 'ws') + '/api/events')),
  };
}"""


@asynccontextmanager
async def site() -> AsyncIterator[int]:
    """A web server of somebody else on this machine, with one empty page; its port."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>evil</title><body></body>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def browsing(*flags: str) -> AsyncIterator[Page]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        page = await browser.new_page()
        page.set_default_timeout(20_000)
        yield page
        await browser.close()


@pytest.mark.parametrize("where", ["evil.example", "127.0.0.1", "localhost"])
@pytest.mark.parametrize("target", ["127.0.0.1", "localhost"])
async def test_a_foreign_page_achieves_nothing(where: str, target: str):
    node = FakeNode()
    node.state["secret"] = SECRET
    async with serving(node) as url, site() as port, browsing(*EVIL) as page:
        await page.goto(f"http://{where}:{port}/")
        got = await page.evaluate(ATTEMPTS, [str(URL(url).with_host(target).origin()), ACTION])
    assert node.launched == node.requests == []
    assert SECRET not in json.dumps(got)
    for name in ("read", "act", "image", "script", "style", "events", "socket"):
        assert got[name] in ("TypeError", "SecurityError"), name
    for name in ("read_blindly", "act_blindly", "act_as_json", "act_without_referrer"):
        assert got[name] in ("opaque ", "TypeError"), name
    for name in ("form", "urlencoded", "page_in_frame", "state_in_frame"):
        assert got[name] == "TypeError" or "Error" in got[name] or "refused" in got[name], name


async def test_a_page_whose_name_is_rebound_to_this_machine_is_refused():
    """First `evil.example` is somebody's server; then the name points to the node, and page and node are one origin."""
    node = FakeNode()
    node.state["secret"] = SECRET
    async with serving(node) as url, browsing(*EVIL) as page:
        home = f"http://evil.example:{URL(url).port}/page"
        await page.route(home, lambda route: route.fulfill(body="<body></body>", content_type="text/html"))
        await page.goto(home)
        got = await page.evaluate(
            """async (body) => {
              const read = async (path, init) => {
                const response = await fetch(path, init);
                return [response.status, await response.text()];
              };
              const headers = {'Content-Type': 'application/json'};
              return [await read('/api/swarm'), await read('/api/instances', {method: 'POST', headers, body})];
            }""",
            ACTION,
        )
    assert [status for status, _ in got] == [403, 403]
    assert SECRET not in json.dumps(got)
    assert all("foreign_host" in text for _, text in got)
    assert node.launched == []
