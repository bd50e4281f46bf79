import { accessSync, constants } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { type HelperProcess, type ProcessExit, startHelper } from '../../host/helper-process.ts';
import { type AgentListener, abortable, listenHybrid } from '../hybrid-vsock.ts';
import { agentPort, type SlotName, type Vm, type VmConfig, type VmExit, type Vmm } from '../vmm.ts';
import { type Accelerator, chooseAccelerator, hostTscKhz } from './accelerator.ts';
import { consoleBufferBytes, qemuArguments } from './command-line.ts';
import { QmpClient } from './qmp.ts';
import { startVsockBackend } from './vsock-backend.ts';

export interface QemuOptions {
  /** Program name (found on PATH) or path. */
  readonly qemu: string;
  readonly vsockBackend: string;
  readonly accelerator: 'auto' | Accelerator;
}

/** Bytes of console kept for an exit report: what fits an error message. */
const consoleTailBytes = 4096;

export function createQemu(options: QemuOptions): Vmm {
  return {
    name: 'qemu',
    capabilities: { pause: true, snapshot: false },
    boot: (config, signal) => bootQemu(options, config, signal),
  };
}

function requireReadable(what: string, file: string): void {
  try {
    accessSync(file, constants.R_OK);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? String(error);
    throw new KilnError('failed-precondition', `${what} ${file} cannot be read: ${reason}`, {
      hint: 'run `npm run setup` to build the guest, or correct the path in the [vm] section of the config file',
      cause: error,
    });
  }
}

async function bootQemu(options: QemuOptions, config: VmConfig, signal: AbortSignal): Promise<Vm> {
  requireReadable('the guest kernel', config.kernel);
  if (config.initrd !== undefined) requireReadable('the guest initrd', config.initrd);
  requireReadable('the guest image', config.guestImage);
  const { accelerator } = chooseAccelerator(options.accelerator);

  await using stack = new AsyncDisposableStack();
  const udsPath = path.join(config.directory, 'vsock');
  const agent = stack.use(await listenHybrid(udsPath, agentPort));
  const qmpSocket = path.join(config.directory, 'qmp.sock');
  const qmpServer = stack.adopt(await listenOnce(qmpSocket), (server) => server.close());
  const backend = await startVsockBackend(
    { program: options.vsockBackend, directory: config.directory, udsPath },
    signal,
  );
  stack.use(backend.process);
  const qemu = stack.use(
    await startHelper({
      program: options.qemu,
      args: qemuArguments({
        config,
        accelerator,
        tscKhz: hostTscKhz(),
        qmpSocket,
        vsock: { kind: 'vhost-user', socket: backend.socket },
      }),
      logFile: path.join(config.directory, 'vmm.log'),
      title: 'QEMU (vm.qemu in the config file)',
      hint: 'install the package qemu-system-x86, or run `npm run setup`',
    }),
  );
  const ended = qemu.exited.then(({ code, signal: by }) => {
    throw new KilnError('internal', `QEMU ended at start (${by ?? `exit code ${code}`}): ${qemu.lastWords()}`);
  });
  ended.catch(() => {});
  const qmp = new QmpClient(await abortable(Promise.race([qmpServer.connection, ended]), signal));
  await abortable(Promise.race([qmp.negotiate(), ended]), signal);
  return new QemuVm(qemu, qmp, agent, stack.move());
}

/** A Unix socket that takes one connection. */
async function listenOnce(socketPath: string): Promise<{ connection: Promise<net.Socket>; close(): void }> {
  const first = Promise.withResolvers<net.Socket>();
  const server = net.createServer((socket) => {
    server.close();
    first.resolve(socket);
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(socketPath, () => resolve());
  });
  return { connection: first.promise, close: () => server.listening && server.close() };
}

class QemuVm implements Vm {
  readonly pid: number;
  readonly #qemu: HelperProcess;
  readonly #qmp: QmpClient;
  readonly #agent: AgentListener;
  readonly #resources: AsyncDisposableStack;
  readonly #exit: Promise<VmExit>;
  readonly #usedSlots = new Set<SlotName>();

  constructor(qemu: HelperProcess, qmp: QmpClient, agent: AgentListener, resources: AsyncDisposableStack) {
    this.pid = qemu.pid;
    this.#qemu = qemu;
    this.#qmp = qmp;
    this.#agent = agent;
    this.#resources = resources;
    this.#exit = this.#awaitExit();
  }

  /** The VM's end is QEMU's end, or the guest's: QEMU then keeps the paused guest until we have read its console. */
  async #awaitExit(): Promise<VmExit> {
    const guestStopped = new Promise<'guest'>((resolve) => {
      this.#qmp.on('event', (name) => {
        if (name === 'SHUTDOWN' || name === 'GUEST_PANICKED') resolve('guest');
      });
    });
    const first = await Promise.race([guestStopped, this.#qemu.exited]);
    if (first !== 'guest') return this.#report(first, false, '');
    const tail = await this.consoleTail(consoleTailBytes);
    await this.#qemu.kill();
    return this.#report({ code: 0, signal: null }, true, tail);
  }

  #report(exit: ProcessExit, guestStopped: boolean, consoleTail: string): VmExit {
    return { code: exit.code, signal: exit.signal, guestStopped, consoleTail };
  }

  async acceptAgent(signal: AbortSignal): Promise<net.Socket> {
    const ended = this.#exit.then((exit) => {
      const how = exit.guestStopped ? 'the guest stopped' : `QEMU ended (${exit.signal ?? `exit code ${exit.code}`})`;
      const words = exit.consoleTail || this.#qemu.lastWords();
      throw new KilnError('unavailable', `${how} before the agent called; last output:\n${words}`);
    });
    ended.catch(() => {});
    return Promise.race([this.#agent.accept(signal), ended]);
  }

  async attachDisk(slot: SlotName, file: string): Promise<void> {
    if (this.#usedSlots.has(slot)) {
      throw new KilnError('failed-precondition', `drive slot ${slot} already has a file`);
    }
    this.#usedSlots.add(slot);
    const readOnly = slot.startsWith('ro');
    const node = `${slot}-file`;
    const file_ = { driver: 'file', 'node-name': node, filename: file, 'read-only': readOnly };
    // Unmapped blocks of a writable file are given back to the host's filesystem.
    await this.#qmp.execute('blockdev-add', readOnly ? file_ : { ...file_, discard: 'unmap' });
    await this.#qmp.execute('blockdev-reopen', {
      options: [{ driver: 'raw', 'node-name': slot, 'read-only': readOnly, file: node }],
    });
  }

  wait(): Promise<VmExit> {
    return this.#exit;
  }

  async consoleTail(maxBytes: number): Promise<string> {
    try {
      const all = await this.#qmp.execute('ringbuf-read', { device: 'console', size: consoleBufferBytes });
      return String(all).slice(-maxBytes).trim();
    } catch {
      return '';
    }
  }

  async kill(): Promise<void> {
    await this.#qemu.kill();
    this.#qmp.close();
    await this.#resources.disposeAsync();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}
