"""Shared ports: several servers listen on one (SO_REUSEPORT), and the newest one gets the new connections.

By itself the kernel distributes connections over all of them, so some would still wait for the old server when it closes its
socket, and be reset. A filter of one instruction, attached to the group of sockets, makes it choose the second one whenever there
are two (Linux 4.5: SO_ATTACH_REUSEPORT_CBPF). The filter belongs to the group: it stays when its first server has gone.
"""

import ctypes
import logging
import socket

log = logging.getLogger("genai_pl.serving")
SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h; Python has no name for it
BPF_RET_K = 0x06  # linux/bpf_common.h: return a constant, here the number of a socket in the group
NEWEST = 1  # of two sockets; where there is one alone the number is too large, and the kernel takes that one


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]


def steer_to_newest(listener: socket.socket) -> bool:
    """True once new connections go to the newest of two servers on the port; False where ports are not shared, or not so."""
    if not hasattr(socket, "SO_REUSEPORT") or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return False
    instructions = (Instruction * 1)(Instruction(BPF_RET_K, 0, 0, NEWEST))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, bytes(Program(1, instructions)))
    except OSError as error:  # other systems than Linux
        log.warning("reuse_port: the old server gets new connections until it stops (%s)", error.strerror)
        return False
    return True


def is_listening(listener: socket.socket) -> bool:
    """True if a socket accepts connections, in this process or another."""
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
