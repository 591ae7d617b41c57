"""A non-blocking TLS socket on the event loop's readiness callbacks.

asyncio's own TLS encrypts a whole write at once and swallows the errors of a handshake that it accepted. Here
every TLS record is one call, the loop gets a turn every 192 KB, and errors reach the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

YIELD_BYTES = 192 * 1024
_RECORD_BYTES = 16 * 1024  # the most plaintext that a TLS record holds
_CALL_COST = 4096  # a call on few bytes still costs time: 48 of them without a wait are a turn too


class _Readiness:
    """Waiters for one direction of one descriptor, or one `listener` that is called every time.

    A loop keeps a single callback per descriptor and direction, and adding one is a system call: so the
    callback stays until it fires with nobody waiting.
    """

    def __init__(self, add: Callable[..., None], remove: Callable[[int], object], descriptor: int):
        self._add = add
        self._remove = remove
        self._descriptor = descriptor
        self._waiters: list[asyncio.Future[None]] = []
        self._armed = False
        self._listener: Callable[[], None] | None = None

    async def wait(self) -> None:
        await self._until_done(self.expect())

    async def watch(self, take: Callable[[], bool]) -> None:
        """Call `take` at every readiness until it returns True; raises what it raises."""
        done = self.expect()

        def look() -> None:
            try:
                if not take():
                    return
            except Exception as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(None)
            self._listener = None

        self._listener = look
        try:
            await self._until_done(done)
        finally:
            self._listener = None

    def expect(self) -> asyncio.Future[None]:
        """A future for the next readiness, unless `watch` is at work."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if not self._armed:
            self._armed = True
            self._add(self._descriptor, self.fire)
        return waiter

    def fire(self) -> None:
        """The descriptor is ready."""
        if self._listener is not None:
            self._listener()
            return
        if not self._waiters:
            self.disarm()
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _until_done(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._remove(self._descriptor)

    def fail(self, error: Exception) -> None:
        """Take the descriptor off the loop and wake every waiter with `error`."""
        self.disarm()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)


class TlsSocket:
    """One TLS connection. At most one task receives and one sends at a time; `close` may be called by any."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None
    ):
        """Take over a connected socket; nothing is sent until `handshake`. A client may send a `server_name` (SNI)."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.remote_address = _address(sock.getpeername())
        self.local_address = _address(sock.getsockname())
        self._tls = context.wrap_socket(
            sock, server_side=server_side, do_handshake_on_connect=False, server_hostname=server_name
        )
        loop = asyncio.get_running_loop()
        descriptor = self._tls.fileno()
        self._readable = _Readiness(loop.add_reader, loop.remove_reader, descriptor)
        self._writable = _Readiness(loop.add_writer, loop.remove_writer, descriptor)
        self._credit = YIELD_BYTES
        self._emptied = False  # the last read left nothing behind, as far as we can see
        self.closed = False

    async def handshake(self) -> bytes:
        """Finish the TLS handshake; the other side's certificate (DER).

        Raises `ssl.SSLError` or `OSError`.
        """
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._readable.wait()
            except ssl.SSLWantWriteError:
                await self._writable.wait()
        return self._tls.getpeercert(binary_form=True) or b""

    @property
    def protocol(self) -> str | None:
        """The application protocol (ALPN) that both sides agreed on."""
        return self._tls.selected_alpn_protocol()

    async def recv_into(self, view: memoryview) -> int:
        """Receive at least one byte into `view`; 0 at the end of the stream.

        Raises `OSError` (`ssl.SSLError` is one).
        """
        while (count := self.recv_now(view)) is None:
            await self._wait(self._readable)
        await self.breathe(count)
        return count

    def recv_now(self, view: memoryview) -> int | None:
        """Receive what is there without waiting; None: nothing is, wait until `readable`. 0 at the end of the stream.

        Raises `OSError`.
        """
        self._check_open()
        if self._emptied:
            self._emptied = False
            return None
        try:
            count = self._tls.recv_into(view)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:  # an answer of TLS itself has no room
            self._writable.expect().add_done_callback(self._read_on)
            return None
        # To find that nothing more is there costs an exception; the loop finds out whether something is for nothing.
        self._emptied = 0 < count < _RECORD_BYTES and not self._tls.pending()
        return count

    async def readable(self, take: Callable[[], bool]) -> None:
        """Call `take` from the loop's callback whenever there may be something to read, until it returns True.

        No task is woken meanwhile. What `take` raises is raised here, and `ConnectionError` when the socket is closed.
        """
        self._check_open()

        def look() -> bool:
            self._credit = YIELD_BYTES
            return take()

        await self._readable.watch(look)

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what fits without waiting, at most one TLS record; 0 if the network is not ready.

        After a 0 the next send must begin with the same bytes. Raises `OSError`.
        """
        self._check_open()
        try:
            return self._tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of `data`. A cancelled call leaves the stream in the middle: then only `close` is left."""
        view = memoryview(data)
        while view:
            self._check_open()
            try:
                count = self._tls.send(view)
            except ssl.SSLWantWriteError:
                await self._wait(self._writable)
            except ssl.SSLWantReadError:
                await self._wait(self._readable)
            else:
                view = view[count:]
                await self.breathe(count)

    def charge(self, count: int) -> bool:
        """Account for `count` bytes moved without waiting; whether they add up to a turn that the loop is owed."""
        self._credit -= max(count, _CALL_COST)
        if self._credit > 0:
            return False
        self._credit = YIELD_BYTES
        return True

    async def breathe(self, count: int) -> None:
        """Account for `count` bytes moved without waiting; gives the loop a turn when they add up."""
        if self.charge(count):
            await asyncio.sleep(0)

    def end_sending(self) -> None:
        """Tell the other side that nothing more comes, so that what was sent last is not lost to a reset."""
        # SSLSocket.shutdown would drop the TLS state with it, and what still comes in could not be read.
        if not self.closed:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._tls, socket.SHUT_WR)

    async def linger(self, seconds: float) -> None:
        """End sending, discard what the other side still sends for at most `seconds`, and close.

        Closing with unread bytes makes the kernel send a reset, which can overtake the alert or the goodbye
        that says why.
        """
        self.end_sending()
        scratch = bytearray(4096)
        with contextlib.suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(seconds):
                for _ in range(16):
                    if self.closed or not await self._discard(scratch):
                        break
        self.close()

    def close(self) -> None:
        """Close at once and wake whoever waits with `ConnectionError`. Idempotent."""
        if self.closed:
            return
        self.closed = True
        error = ConnectionAbortedError("the connection was closed on this side")
        self._readable.fail(error)
        self._writable.fail(error)
        self._tls.close()

    async def _discard(self, scratch: bytearray) -> int:
        try:
            return socket.socket.recv_into(self._tls, scratch)
        except BlockingIOError:
            await self._readable.wait()
            return 1

    def _read_on(self, writable: asyncio.Future[None]) -> None:
        if not writable.cancelled() and writable.exception() is None:
            self._readable.fire()

    async def _wait(self, readiness: _Readiness) -> None:
        self._credit = YIELD_BYTES
        await readiness.wait()

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionAbortedError("the connection was closed on this side")


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    host = name[0]
    if len(name) == 4 and name[3] and "%" not in host:
        host = f"{host}%{name[3]}"
    return host, name[1]
