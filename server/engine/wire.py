"""Frames on the socket between the two processes: a length (uint32, little endian) and a msgpack-encoded message."""

from __future__ import annotations

import select
import socket
import struct

import msgspec

from .messages import DownMessage, UpMessage

_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 18

_encoder = msgspec.msgpack.Encoder()
down_decoder: msgspec.msgpack.Decoder[DownMessage] = msgspec.msgpack.Decoder(DownMessage)
up_decoder: msgspec.msgpack.Decoder[UpMessage] = msgspec.msgpack.Decoder(UpMessage)


class ConnectionClosed(Exception):
    """The other process has gone."""


def encode_frame(message: DownMessage | UpMessage) -> bytes:
    return frame(_encoder.encode(message))


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class FrameBuffer:
    """Cuts a byte stream into frames, however it arrives."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Every frame that is complete now."""
        self._data += data
        frames = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            end = start + _LENGTH.size + length
            if len(self._data) < end:
                break
            frames.append(bytes(self._data[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return frames


class Channel:
    """The engine's end: blocking sends, receives with a timeout. Raises ConnectionClosed when the peer is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: UpMessage) -> None:
        try:
            self._socket.sendall(encode_frame(message))
        except OSError as error:
            raise ConnectionClosed(str(error)) from error

    def receive_frames(self, timeout_s: float) -> list[bytes]:
        """All frames at hand, waiting up to `timeout_s` for the first bytes (0: not at all)."""
        frames: list[bytes] = []
        timeout_ms = int(timeout_s * 1000)
        while self._poll.poll(timeout_ms):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise ConnectionClosed(str(error)) from error
            if not data:
                raise ConnectionClosed("end of stream")
            frames += self._buffer.feed(data)
            timeout_ms = 0
        return frames

    def receive(self, timeout_s: float) -> list[DownMessage]:
        return [down_decoder.decode(payload) for payload in self.receive_frames(timeout_s)]
