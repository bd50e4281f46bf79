/**
 * Everything around a container, without a VM: a scripted VMM whose "guest" is a scripted agent behind a real gRPC
 * connection, a real process as stand-in (in a network namespace of its own), and stdio in memory.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import type net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough, type Readable, Writable } from 'node:stream';
import { defaultConfig } from '../../../src/config/config.ts';
import type { HelperProcess } from '../../../src/host/helper-process.ts';
import { startStandIn } from '../../../src/host/stand-in.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Timeline } from '../../../src/observe/timeline.ts';
import type { VolumeMount } from '../../../src/oci/binds.ts';
import type { RootfsPlan, RootfsStore } from '../../../src/rootfs/index.ts';
import type { ContainerDevices } from '../../../src/sandbox/block-devices.ts';
import { BootSlots } from '../../../src/sandbox/boot-slots.ts';
import type { Container } from '../../../src/sandbox/container.ts';
import { bootContainer, reattachContainer } from '../../../src/sandbox/create.ts';
import { bootPod, type PodRequest } from '../../../src/sandbox/create-pod.ts';
import type { ExecRequest } from '../../../src/sandbox/exec.ts';
import type { HookPlan } from '../../../src/sandbox/hooks.ts';
import type { Pod } from '../../../src/sandbox/pod.ts';
import { type AloneRecord, writeContainerRecord } from '../../../src/sandbox/record.ts';
import type { ContainerRequest, HostServices } from '../../../src/sandbox/resources.ts';
import type { Sandbox } from '../../../src/sandbox/sandbox.ts';
import type { ContainerStdio } from '../../../src/sandbox/stdio.ts';
import type { FileServers } from '../../../src/sandbox/volumes.ts';
import type { Template } from '../../../src/template/store.ts';
import {
  type MemoryGrowth,
  type NetworkCard,
  readOnlySlots,
  type SlotName,
  type Vm,
  type VmConfig,
  type VmExit,
  type Vmm,
  type VmRecord,
  writableSlots,
} from '../../../src/vmm/vmm.ts';
import { type Script, ScriptedAgent, socketPair } from '../guest/scripted-agent.ts';

/** How a network namespace can be had here: as root, or in a user namespace; undefined: not at all. */
const unshare = ['unshare -n', 'unshare -r -n'].find((command) => {
  return spawnSync('/bin/sh', ['-c', `${command} true`]).status === 0;
});
export const canMakeNetns = unshare !== undefined;

/** By which the agent of a container that is taken over is known. */
export const session = 'the session of before';

const noHooks = { prestart: [], createRuntime: [], poststart: [], poststop: [] };

export class ScriptedVm implements Vm {
  readonly pid = 1_000_000;
  nics: readonly NetworkCard[] = [];
  get freeSlots(): SlotName[] {
    return [...readOnlySlots, ...writableSlots].filter((slot) => !this.disks.some(([used]) => used === slot));
  }
  memoryGrowth: MemoryGrowth | null = null;
  readonly config: VmConfig;
  readonly agent: ScriptedAgent;
  readonly disks: [SlotName, string][] = [];
  /** It was moved to another control group. */
  entered = false;
  leftPool = false;
  readonly #log: string[];
  readonly #exit = Promise.withResolvers<VmExit>();
  readonly #channelLost = Promise.withResolvers<void>();
  readonly channelLost = this.#channelLost.promise;
  #ended = false;
  #socket: net.Socket | undefined;
  /** Set one to change what happens. */
  hooks: {
    acceptAgent?: (signal: AbortSignal) => Promise<net.Socket>;
    attachDisk?: () => Promise<void>;
    acceptFiles?: () => Promise<number>;
    consoleTail?: () => Promise<string>;
    kill?: () => Promise<void>;
  };

  constructor(config: VmConfig, agent: ScriptedAgent, log: string[], hooks: ScriptedVm['hooks']) {
    this.config = config;
    this.agent = agent;
    this.#log = log;
    this.hooks = hooks;
  }

  async acceptAgent(signal: AbortSignal): Promise<net.Socket> {
    if (this.hooks.acceptAgent !== undefined) return this.hooks.acceptAgent(signal);
    const [ours, theirs] = await socketPair();
    this.#socket = ours;
    this.agent.serve(theirs);
    return ours;
  }

  acceptFiles(): Promise<number> {
    return this.hooks.acceptFiles?.() ?? Promise.reject(new Error('no file channel is played here'));
  }

  async attachDisk(slot: SlotName, file: string): Promise<string> {
    await this.hooks.attachDisk?.();
    this.disks.push([slot, file]);
    return slot;
  }

  async detachDisk(slot: SlotName): Promise<void> {
    const index = this.disks.findIndex(([used]) => used === slot);
    if (index >= 0) this.disks.splice(index, 1);
  }

  record(): VmRecord {
    return { pid: this.pid };
  }

  leavePool(): void {
    this.leftPool = true;
  }

  cardMoved(): void {}

  async enter(): Promise<void> {
    this.entered = true;
  }

  wait(): Promise<VmExit> {
    return this.#exit.promise;
  }

  async consoleTail(): Promise<string> {
    return this.hooks.consoleTail?.() ?? 'last words of the guest';
  }

  /** The VM ends by itself, or by somebody else's hand; its agent's connection breaks. */
  end(exit: Partial<VmExit>): void {
    this.#ended = true;
    this.#exit.resolve({ code: null, signal: null, guestStopped: false, consoleTail: '', ...exit });
    this.agent.disconnect();
    this.#socket?.destroy();
  }

  /** The way to the agent ends; the VM lives on. */
  loseChannel(): void {
    this.#channelLost.resolve();
    this.agent.disconnect();
    this.#socket?.destroy();
  }

  async kill(): Promise<void> {
    if (!this.#ended) this.#log.push('vm killed');
    this.end({ signal: 'SIGKILL' });
    await this.hooks.kill?.();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

export class MemoryStdio implements ContainerStdio {
  readonly stdin: Readable | null;
  readonly stdout: Writable | null;
  readonly stderr: Writable | null = null;
  readonly #log: string[];
  /** Set to hold what the client reads. */
  stalled = false;
  readonly written: Buffer[] = [];
  disposals = 0;
  startError: Error | undefined;
  /** Its client has sent nothing, and is gone at the start. */
  stdinIsEmpty = false;

  constructor(log: string[]) {
    this.#log = log;
    this.stdin = new PassThrough();
    this.stdout = new Writable({
      write: (chunk: Buffer, _encoding, done) => {
        if (this.stalled) return;
        this.written.push(chunk);
        done();
      },
    });
    this.stdin.on('error', () => {});
    this.stdout.on('error', () => {});
  }

  startStdin({ clientMayReturn = false } = {}): boolean {
    this.#log.push(clientMayReturn ? 'stdin taken over' : 'stdin started');
    if (this.startError !== undefined) throw this.startError;
    return this.stdinIsEmpty;
  }

  closeStdin(): void {
    this.#log.push('stdin closed');
  }

  async finish(): Promise<void> {
    this.stdin?.destroy();
    await new Promise<void>((resolve) => {
      if (this.stdout?.closed) resolve();
      this.stdout?.once('close', resolve);
      this.stdout?.end();
    });
  }

  async dispose(): Promise<void> {
    this.disposals += 1;
    this.stdin?.destroy();
    this.stdout?.destroy();
  }
}

/** An Exec as the daemon prepares it; `stdio` is opened when it is started. */
export function execRequest(bench: Workbench, execId: string, fields: Partial<ExecRequest> = {}) {
  const stdio = new MemoryStdio(bench.events);
  const request: ExecRequest = {
    execId,
    directory: join(bench.directory, `exec-${execId}`),
    process: '{"args":["id"]}',
    terminal: false,
    terminalSize: undefined,
    openStdio: async () => stdio,
    ...fields,
  };
  return { request, stdio };
}

interface LogLine {
  readonly level: string;
  readonly msg: string;
  readonly marks?: unknown;
  readonly err?: { readonly message: string };
}

export class Workbench implements AsyncDisposable {
  /** What happened to resources, in order. */
  readonly events: string[] = [];
  readonly log: LogLine[] = [];
  readonly stdio = new MemoryStdio(this.events);
  readonly timeline = new Timeline();
  readonly agent: ScriptedAgent;
  readonly root = mkdtempSync(join(tmpdir(), 'kiln-sandbox-'));
  readonly directory = join(this.root, 'c1');
  /** Set before `create` to change what happens. */
  vmHooks: ScriptedVm['hooks'] = {};
  prepareRootfs: (signal: AbortSignal) => Promise<void> = async () => {};
  releaseRootfs: () => Promise<void> = async () => {};
  fileServers: FileServers = {
    start: () => Promise.reject(new Error('this test has no volumes')),
    adopt: () => Promise.reject(new Error('this test has no volumes')),
  };
  volumes: readonly VolumeMount[] = [];
  blockDevices: ContainerDevices = { devices: [], filesystems: [] };
  /** Sandboxes that have left their network. */
  networksLeft = 0;
  /** The guests whose clocks are looked after. */
  readonly clocksKept: unknown[] = [];
  beforeBoot: (signal: AbortSignal) => Promise<void> = async () => {};
  bootTimeoutS = 60;
  #template: Template | undefined;
  /** What waits in the pool, if there is a template. */
  waiting: Sandbox | undefined;
  terminal = false;
  bundle = this.root;
  hooks: Partial<Pick<HookPlan, keyof typeof noHooks>> = {};
  resolvConf: string | undefined;
  /** Lines of shell in place of a stand-in that is well. */
  standIn = `exec ${unshare} -- /bin/sh -c 'echo ready >&3; exec 3>&-; exec sleep 1000'`;
  vm: ScriptedVm | undefined;
  container: Container | undefined;
  #leftStandIn: HelperProcess | undefined;

  constructor(script: Script = {}) {
    this.agent = new ScriptedAgent(script);
  }

  async create(signal: AbortSignal = new AbortController().signal): Promise<Container> {
    this.container = await bootContainer(
      { ...this.#host(), standInProgram: this.#standIn(), bootSlots: new BootSlots(1) },
      this.#request(),
      signal,
    );
    return this.container;
  }

  /** A pod, with the container that stands for it. */
  createPod(onGone: () => void, podFiles?: PodRequest['podFiles']) {
    return bootPod(
      { ...this.#host(), standInProgram: this.#standIn(), bootSlots: new BootSlots(1) },
      { ...this.#request(), guestPod: { hostname: '', domainname: '', sysctl: {}, shmBytes: 0 }, podFiles, onGone },
      new AbortController().signal,
    );
  }

  /** A container in a pod. */
  createMember(pod: Pod): Promise<Container> {
    return bootContainer(
      { ...this.#host(), standInProgram: this.#standIn(), bootSlots: new BootSlots(0) },
      { ...this.#request(), id: 'm1', directory: join(this.root, 'm1'), pod },
      new AbortController().signal,
    );
  }

  /** Has VMs be restored from a template, after `restore`. */
  useTemplate(restore: () => Promise<void> = async () => {}): void {
    const driver: Template['driver'] = {
      files: [],
      clonesAreCold: false,
      fingerprint: () => [],
      boot: () => Promise.reject(new Error('this test makes no template')),
      restore: async (config) => {
        await restore();
        this.vm = new ScriptedVm(config, this.agent, this.events, this.vmHooks);
        return this.vm;
      },
    };
    this.#template = { key: 'k', directory: '/templates/k', driver };
  }

  /** What an earlier kilnd has left of a container that runs: its directory, its stand-in, and its record. */
  async leave(fields: Partial<AloneRecord> = {}): Promise<AloneRecord> {
    mkdirSync(this.directory, { mode: 0o700 });
    const standIn = await startStandIn({ program: this.#standIn(), id: 'c1', directory: this.directory });
    this.#leftStandIn = standIn;
    if (standIn.identity === undefined) throw new Error('the stand-in has ended');
    const record: AloneRecord = {
      place: 'alone',
      ...{ version: 1, id: 'c1', terminal: this.terminal, session, answerLimitMs: 5000, volumeCache: 'mmap' },
      ...{ vmm: 'scripted', vm: { pid: 1_000_000 }, standIn: standIn.identity, oomKills: 0 },
      hooks: this.#request().hooks,
      disks: { lower: '/cache/lower.erofs', writable: '/work/rw.ext4' },
      ...fields,
    };
    writeContainerRecord(this.directory, record);
    return record;
  }

  /** Takes over what `leave` has left. Its agent must say Hello with `session`. */
  async adopt(record: AloneRecord, execs: readonly ExecRequest[] = [], vmm: Partial<Vmm> = {}) {
    const { directory, timeline, logger, openStdio } = this.#request();
    const adopt: Vmm['adopt'] = async () => {
      const config = { directory } as VmConfig;
      this.vm = new ScriptedVm(config, this.agent, this.events, this.vmHooks);
      return this.vm;
    };
    const scripted: Vmm = { name: 'scripted', boot: () => Promise.reject(new Error('nothing boots')), adopt, ...vmm };
    const adopted = await reattachContainer(
      { ...this.#host(), standInProgram: '/nowhere', bootSlots: new BootSlots(0) },
      { record, directory, vmm: scripted, openStdio, execs, timeline, logger },
      new AbortController().signal,
    );
    this.container = adopted.container;
    return adopted;
  }

  /** Log lines of a level, as `message: error`. */
  logged(...levels: string[]): string[] {
    return this.log
      .filter(({ level }) => levels.includes(level))
      .map(({ msg, err }) => (err === undefined ? msg : `${msg}: ${err.message}`));
  }

  /** True when nothing that the container had is there any more. */
  get clean(): boolean {
    return !existsSync(this.directory);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.container?.destroy().catch(() => {});
    await this.#leftStandIn?.kill();
    this.agent.disconnect();
    rmSync(this.root, { recursive: true, force: true });
  }

  #host() {
    const templates: HostServices['templates'] = {
      provide: async () => this.#template,
      noteRestored: (bootId) => void this.events.push(`restored ${bootId}`),
      noteFailure: (_template, error) => void this.events.push(`not restored: ${(error as Error).message}`),
    };
    const pool: HostServices['pool'] = {
      take: async () => this.waiting,
      creating: () => ({ [Symbol.dispose]: () => {} }),
    };
    const parking: HostServices['parking'] = { run: (action) => action() };
    const leave = async () => {
      this.networksLeft += 1;
    };
    const none = {
      connect: async () => undefined,
      told: () => {},
      bindLoopback: () => -1,
      ask: async () => 'none' as const,
      admitAnswers: () => {},
      watch: () => ({ [Symbol.dispose]: () => {} }),
      [Symbol.asyncDispose]: leave,
    };
    const networks = { attach: () => none, adopt: () => none };
    const clocks: HostServices['clocks'] = { keep: ({ guest }) => void this.clocksKept.push(guest) };
    return { rootfs: this.#rootfs(), templates, pool, fileServers: this.fileServers, parking, networks, clocks };
  }

  #rootfs(): RootfsStore {
    const prepare: RootfsStore['prepare'] = async (_plan, { signal }) => {
      await this.prepareRootfs(signal);
      const release = async () => {
        this.events.push('rootfs released');
        await this.releaseRootfs();
      };
      return {
        lower: { file: '/cache/lower.erofs', readOnly: true, format: 'erofs' },
        writable: { file: '/work/rw.ext4', readOnly: false, format: 'ext4' },
        release,
        [Symbol.asyncDispose]: release,
      };
    };
    const adopt: RootfsStore['adopt'] = ({ lower, writable }) => {
      this.events.push(`rootfs taken over: ${lower} ${writable}`);
      const release = async () => {
        this.events.push('rootfs released');
        await this.releaseRootfs();
      };
      return {
        lower: { file: lower, readOnly: true, format: 'erofs' },
        writable: writable === null ? null : { file: writable, readOnly: false, format: 'ext4' },
        release,
        [Symbol.asyncDispose]: release,
      };
    };
    return { prepare, adopt } as unknown as RootfsStore;
  }

  #standIn(): string {
    const program = join(this.root, 'stand-in');
    writeFileSync(program, `#!/bin/sh\n${this.standIn}\n`);
    chmodSync(program, 0o755);
    return program;
  }

  #request(): ContainerRequest {
    const vmm: Vmm = {
      name: 'scripted',
      boot: async (config, signal) => {
        await this.beforeBoot(signal);
        this.vm = new ScriptedVm(config, this.agent, this.events, this.vmHooks);
        return this.vm;
      },
      adopt: () => Promise.reject(new Error('this test takes no VM over')),
    };
    return {
      id: 'c1',
      directory: this.directory,
      vmm,
      config: { ...defaultConfig, vm: { ...defaultConfig.vm, bootTimeoutS: this.bootTimeoutS } },
      spec: (numbers, devices) => JSON.stringify({ numbers, ...(devices.length > 0 && { devices }) }),
      volumes: this.volumes,
      blockDevices: this.blockDevices,
      resolvConf: this.resolvConf,
      networkNamespace: undefined,
      rootfs: {} as RootfsPlan,
      hooks: {
        ...noHooks,
        ...this.hooks,
        bundle: this.bundle,
        ociVersion: '1.2.1',
        annotations: { 'org.example': 'x' },
      },
      files: { kernel: '/k', initrd: undefined, guestImage: '/g' },
      memoryMib: 256,
      vcpus: 1,
      terminal: this.terminal,
      terminalSize: this.terminal ? { width: 80, height: 24 } : undefined,
      openStdio: async () => this.stdio,
      timeline: this.timeline,
      logger: loggerTo({ write: (line) => void this.log.push(JSON.parse(line) as LogLine) }, 'trace'),
    };
  }
}

/** Whether a process lives; a zombie does not. */
export function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
