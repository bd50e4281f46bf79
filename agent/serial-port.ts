/**
 * A virtio-serial port as the way to the host (`kiln.channel=virtio-serial` on the kernel's command line): a character
 * device that one program may open at a time. While the host's end is not open, reading it gives an end at once
 * (drivers/char/virtio_console.c, port_fops_read), so dialling is tried again until the host is there.
 */
import { spawnSync } from 'node:child_process';
import { constants, existsSync, openSync, readdirSync, readFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { answerSerialSession } from '../src/rpc/serial-session.ts';
import { socketFromDevice } from '../src/sys/terminal.ts';
import { AgentError } from './errors.ts';
import { holdWritesTo } from './held-writes.ts';

/** A connection to the host. */
export interface Dialled {
  readonly socket: Socket;
  /** Just before the host could come to know of it: `performance.now()`. */
  readonly at: number;
}

/** The name of the agent's port, which src/vmm/qemu/command-line.ts gives it. */
const portName = 'kiln.agent';

const portsDirectory = '/sys/class/virtio-ports';

/** Opens the port; resolves when the host speaks on it. Rejects when there is none, or the host's end is not open. */
export async function dialSerialPort(): Promise<Dialled> {
  const { O_RDWR, O_NONBLOCK } = constants;
  const fd = openSync(findPort(portName), O_RDWR | O_NONBLOCK);
  holdWritesTo(fd);
  const socket = socketFromDevice(fd, 'both');
  try {
    return { socket, at: await answerSerialSession(socket) };
  } catch (error) {
    socket.destroy();
    throw error;
  }
}

/** The device of the port of that name. @throws AgentError not-found */
export function findPort(portName: string): string {
  // A module of the generic kernel, built into the minimal one.
  if (!existsSync(portsDirectory)) spawnSync('modprobe', ['virtio_console']);
  const ports = existsSync(portsDirectory) ? readdirSync(portsDirectory) : [];
  const port = ports.find((name) => readFileSync(join(portsDirectory, name, 'name'), 'utf8').trim() === portName);
  if (port === undefined) throw new AgentError('not-found', `there is no virtio-serial port ${portName}`);
  return `/dev/${port}`;
}
