/**
 * Plays Firecracker as far as its documents promise, as a process of its own under the driver's eyes: everything but the
 * machine is real. What it insists on is what v1.16 does:
 *
 * - the API socket must not exist yet; a body without Content-Length is no body (micro-http, src/connection.rs);
 * - an unknown field, a missing one or a wrong type is 400 with `fault_message` (`deny_unknown_fields`, src/vmm/src/
 *   vmm_config); the id in a drive's path is the one in its body (src/firecracker/src/api_server/request/drive.rs);
 * - configuration comes before the start, PATCH /drives after it, InstanceStart once (src/vmm/src/rpc_interface.rs);
 * - PUT /vsock binds `uds_path`, which must not exist; a guest's call to port P arrives at `<uds_path>_P`, and
 *   "CONNECT P\n" must come in one piece (docs/vsock.md; src/vmm/src/devices/virtio/vsock/unix/muxer.rs);
 * - PUT /snapshot/create takes a paused VM, and PUT /snapshot/load a Firecracker that was told nothing of a VM yet; a load
 *   that fails is answered, and ends it (docs/snapshotting/snapshot-support.md; src/vmm/src/rpc_interface.rs, boot_path). The
 *   files are in fake-snapshot.ts. A guest that was restored has lost its connections (docs/vsock.md), and calls again;
 * - memory that can be added is told of before the start, in slots of 128 MiB, and asked for while the VM runs, in blocks of 2;
 *   the guest takes it after the answer, and a device without a driver is not active (docs/memory-hotplug.md; src/vmm/src/
 *   vmm_config/memory_hotplug.rs; src/vmm/src/devices/virtio/mem/device.rs, update_requested_size). All of it since 1.14;
 * - under a jailer, which says so by --parent-cpu-time-us, every path is one below its root directory (docs/jailer.md);
 * - the log and the metrics go to FIFOs that are there, and what does not fit is lost (src/vmm/src/utils/mod.rs,
 *   open_file_nonblock); the form of a log line is that of --show-level (src/vmm/src/logger/logging.rs), metrics are written at
 *   the start (docs/metrics.md), and the last line of the log tells the exit code (src/firecracker/src/main.rs);
 * - neither socket is removed at the end, and a guest that reboots ends it with 0 (FAQ.md).
 */
import { appendFileSync, constants, existsSync, openSync, writeSync } from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import { z } from 'zod';
import { readSnapshot, type Saved, writeSnapshot } from './fake-snapshot.ts';

const jailed = process.argv.includes('--parent-cpu-time-us');

/** Where a path of its own is; the jailer has made the root directory the working directory. */
const real = (path: string): string => (jailed ? `.${path}` : path);

const file = z.string().refine((path) => existsSync(real(path)), { error: 'No such file or directory (os error 2)' });
const bucket = z.strictObject({
  size: z.int().min(0),
  refill_time: z.int().min(0),
  one_time_burst: z.int().optional(),
});
const rateLimiter = z.strictObject({ bandwidth: bucket.optional(), ops: bucket.optional() });
const driveId = z.string().regex(/^[A-Za-z0-9_]+$/);
const bodies: Readonly<Record<string, z.ZodType>> = {
  'PUT /machine-config': z
    .strictObject({
      vcpu_count: z.int().min(1).max(32),
      mem_size_mib: z.int().min(1),
      smt: z.boolean().optional(),
      track_dirty_pages: z.boolean().optional(),
      huge_pages: z.enum(['None', '2M']).optional(),
    })
    // src/vmm/src/vmm_config/machine_config.rs, IncompatibleMemorySize.
    .refine(({ huge_pages: pages, mem_size_mib: mib }) => pages !== '2M' || mib % 2 === 0),
  'PUT /boot-source': z.strictObject({
    kernel_image_path: file,
    initrd_path: file.optional(),
    boot_args: z.string().max(2048).optional(),
  }),
  'PUT /drives': z.strictObject({
    drive_id: driveId,
    path_on_host: file,
    is_root_device: z.boolean(),
    is_read_only: z.boolean().optional(),
    cache_type: z.enum(['Unsafe', 'Writeback']).optional(),
    rate_limiter: rateLimiter.optional(),
    partuuid: z.string().optional(),
  }),
  'PATCH /drives': z.strictObject({ drive_id: driveId, path_on_host: file.optional() }),
  'PUT /network-interfaces': z.strictObject({
    iface_id: driveId,
    host_dev_name: z.string().min(1).max(15),
    guest_mac: z
      .string()
      .regex(/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/)
      .optional(),
    rx_rate_limiter: rateLimiter.optional(),
    tx_rate_limiter: rateLimiter.optional(),
  }),
  'PUT /serial': z.strictObject({ serial_out_path: z.string().optional(), rate_limiter: bucket.optional() }),
  'PUT /vsock': z.strictObject({
    guest_cid: z.int().min(3),
    uds_path: z.string(),
    vsock_id: z.string().optional(),
  }),
  'PUT /balloon': z.strictObject({
    amount_mib: z.int().min(0),
    deflate_on_oom: z.boolean(),
    stats_polling_interval_s: z.int().optional(),
    free_page_reporting: z.boolean().optional(),
    free_page_hinting: z.boolean().optional(),
  }),
  'PUT /hotplug/memory': z
    .strictObject({
      total_size_mib: z.int().min(128),
      slot_size_mib: z.int().min(128).default(128),
      block_size_mib: z.int().min(2).default(2),
    })
    .refine(({ total_size_mib: total, slot_size_mib: slot }) => total % slot === 0),
  'PATCH /hotplug/memory': z.strictObject({ requested_size_mib: z.int().min(0) }),
  'PUT /entropy': z.strictObject({}),
  'PATCH /vm': z.strictObject({ state: z.enum(['Paused', 'Resumed']) }),
  'PUT /snapshot/create': z.strictObject({
    snapshot_type: z.enum(['Full', 'Diff']).optional(),
    snapshot_path: z.string(),
    mem_file_path: z.string(),
  }),
  'PUT /snapshot/load': z.strictObject({
    snapshot_path: z.string(),
    mem_backend: z.strictObject({ backend_type: z.enum(['File', 'Uffd']), backend_path: z.string() }),
    resume_vm: z.boolean().optional(),
    track_dirty_pages: z.boolean().optional(),
    network_overrides: z.array(z.strictObject({ iface_id: z.string(), host_dev_name: z.string() })).optional(),
    vsock_override: z.strictObject({ uds_path: z.string() }).optional(),
    clock_realtime: z.boolean().optional(),
  }),
  'PUT /actions': z.strictObject({ action_type: z.enum(['InstanceStart', 'FlushMetrics', 'SendCtrlAltDel']) }),
};

/** What a request may not have, of the versions before the one that brought it: CHANGELOG.md. */
const fieldsSince: Readonly<Record<string, Readonly<Record<string, number>>>> = {
  'PUT /balloon': { free_page_reporting: 14 },
  'PUT /serial': { rate_limiter: 16 },
  'PUT /snapshot/load': { vsock_override: 16, clock_realtime: 16 },
};

/** Requests that only later versions know: CHANGELOG.md. */
const requestsSince: Readonly<Record<string, number>> = {
  'PUT /serial': 14,
  'PUT /hotplug/memory': 14,
  'PATCH /hotplug/memory': 14,
};

/** src/vmm/src/rpc_interface.rs: after one of these no snapshot is loaded (boot_path). */
const configuresVm =
  /^PUT \/(machine-config|boot-source|drives|network-interfaces|vsock|balloon|entropy|hotplug\/memory)$/;

/** v1.16 src/firecracker/src/main.rs; each is there since 1.13. */
const flags = new Set(
  '--id --api-sock --log-path --level --show-level --metrics-path --start-time-us --start-time-cpu-us --parent-cpu-time-us --boot-timer'.split(
    ' ',
  ),
);

class Refusal extends Error {
  /** Firecracker ends when it has said so. */
  readonly isFatal: boolean;

  constructor(message: string, isFatal = false) {
    super(message);
    this.isFatal = isFatal;
  }
}

export function main(mode: string, self: string): void {
  const [name = '', detail = ''] = mode.split('=');
  const args = process.argv.slice(2);
  const argument = (flag: string): string => args[args.indexOf(flag) + 1] ?? '';
  if (args.includes('--version')) {
    process.stdout.write(`Firecracker v${name === 'version' ? detail : '1.16.1'}\n\n`);
    return;
  }
  for (const flag of args.filter((each) => each.startsWith('--'))) {
    if (!flags.has(flag)) end(`Found argument '${flag}' which wasn't expected`, 153);
  }
  if (!/^[A-Za-z0-9-]{1,64}$/.test(argument('--id'))) end('Invalid instance ID', 153);
  if (name === 'exit') end('Firecracker panicked at start', Number(detail));
  write('--log-path', logLine('INFO', 'Running Firecracker v1.16.1'));
  if (name === 'idle') setInterval(() => {}, 1 << 30);
  else new Firecracker(name, detail, self).serve(argument('--api-sock'));
}

function end(words: string, code: number): never {
  process.stderr.write(`${words}\n`);
  write('--log-path', logLine('ERROR', words));
  write('--log-path', logLine('INFO', `Firecracker exiting with error. exit_code=${code}`));
  process.exit(code);
}

function logLine(level: string, words: string): string {
  const id = process.argv[process.argv.indexOf('--id') + 1];
  return `2026-01-31T12:00:00.000000000 [${id}:main:${level}] ${words}\n`;
}

/** Writes to the file that an argument names, without waiting. */
function write(flag: string, text: string): void {
  const at = process.argv.indexOf(flag);
  if (at === -1) return;
  const { O_RDWR, O_CREAT, O_NONBLOCK } = constants;
  try {
    writeSync(openSync(real(process.argv[at + 1] ?? ''), O_RDWR | O_CREAT | O_NONBLOCK), text);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
  }
}

class Firecracker {
  readonly #mode: string;
  readonly #detail: string;
  readonly #self: string;
  /** By id, the path of each one's file. */
  #drives: Record<string, string> = {};
  #bootSource = { boot_args: '' };
  /** By id, the tap of each network interface. */
  #interfaces: Record<string, string> = {};
  #memoryMib = 0;
  /** What the VM can get, was asked to take, and has taken, in MiB; undefined without such memory. */
  #hotplug: { total: number; requested: number; plugged: number } | undefined;
  /** As it was told, and where that is. */
  #vsock: { readonly told: string; readonly at: string } | undefined;
  #state: 'Not started' | 'Running' | 'Paused' = 'Not started';
  #configured = false;

  constructor(mode: string, detail: string, self: string) {
    this.#mode = mode;
    this.#detail = detail;
    this.#self = self;
  }

  serve(socket: string): void {
    const server = http.createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const text = request.headers['content-length'] === undefined ? '' : Buffer.concat(chunks).toString();
        this.#answer(request.method ?? '', request.url ?? '', text, response);
      });
    });
    server.on('error', (error) => end(`Failed to open the API socket: ${error.message}`, 1));
    server.listen(real(socket));
  }

  #answer(method: string, url: string, text: string, response: http.ServerResponse): void {
    const body: unknown = text === '' ? undefined : JSON.parse(text);
    appendFileSync(`${this.#self}.requests`, `${JSON.stringify({ name: `${method} ${url}`, body })}\n`);
    const asked = this.#detail === `${method} ${url}`;
    if (asked && this.#mode === 'die') end('Shutting down VM after bad syscall', 148);
    if (asked && this.#mode === 'hang') return;
    const reply = (status: number, answer?: object) => {
      response.writeHead(status, { 'Content-Type': 'application/json' });
      response.end(answer === undefined ? undefined : JSON.stringify(answer));
    };
    try {
      if (asked && this.#mode === 'refuse') throw new Refusal('not in the mood');
      const answer = this.#act(method, url, body);
      reply(answer === undefined ? 204 : 200, answer);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      if (error.isFatal) response.on('finish', () => end(error.message, 1));
      reply(400, { fault_message: error.message });
    }
  }

  get #version(): string {
    return this.#mode === 'version' ? this.#detail : '1.16.1';
  }

  /** The body of the answer, if it has one. */
  #act(method: string, url: string, body: unknown): object | undefined {
    if (method === 'GET' && url === '/version') return { firecracker_version: this.#version };
    if (method === 'GET' && url === '/') return { state: this.#state, id: 'x' };
    if (method === 'GET' && url === '/hotplug/memory') return this.#lookAtMemory();
    const [, resource = '', id] = /^\/(snapshot|hotplug)\//.test(url) ? ['', url.slice(1)] : url.split('/');
    const name = `${method} /${resource}`;
    const fields = this.#fieldsOf(name, id, body);
    if (configuresVm.test(name)) this.#configured = true;
    if (name === 'PUT /boot-source') this.#bootSource = { boot_args: fields.boot_args ?? '' };
    if (name === 'PUT /machine-config') this.#memoryMib = Number(fields.mem_size_mib);
    else if (name === 'PUT /hotplug/memory')
      this.#hotplug = { total: Number(fields.total_size_mib), requested: 0, plugged: 0 };
    else if (name === 'PATCH /hotplug/memory') this.#askToTake(Number(fields.requested_size_mib));
    else if (name === 'PUT /drives') this.#drives[id ?? ''] = fields.path_on_host ?? '';
    else if (name === 'PATCH /drives') this.#swap(id ?? '', fields.path_on_host ?? '');
    else if (name === 'PUT /network-interfaces') this.#interfaces[id ?? ''] = fields.host_dev_name ?? '';
    else if (name === 'PUT /vsock') this.#bindVsock(fields.uds_path ?? '');
    else if (name === 'PUT /actions') this.#start();
    else if (name === 'PATCH /vm') this.#state = fields.state === 'Paused' ? 'Paused' : 'Running';
    else if (name === 'PUT /snapshot/create') this.#save(body as SnapshotPaths);
    else if (name === 'PUT /snapshot/load') this.#load(body as LoadRequest);
    return undefined;
  }

  #lookAtMemory(): object {
    const { total, requested, plugged } = this.#hotplug ?? this.#noHotplug();
    // The guest takes a part of it between two looks.
    if (this.#hotplug !== undefined && this.#mode !== 'takes-no-memory') {
      this.#hotplug.plugged = Math.min(requested, plugged + 128);
    }
    return {
      ...{ block_size_mib: 2, slot_size_mib: 128 },
      ...{ total_size_mib: total, requested_size_mib: requested, plugged_size_mib: plugged },
    };
  }

  #noHotplug(): never {
    throw new Refusal('Memory hotplug device is not configured');
  }

  #askToTake(mib: number): void {
    const hotplug = this.#hotplug ?? this.#noHotplug();
    if (this.#mode === 'no-memory-driver') throw new Refusal('Device is not active');
    if (mib % 2 !== 0 || mib > hotplug.total) throw new Refusal(`Size ${mib} is invalid`);
    hotplug.requested = mib;
  }

  #swap(id: string, path: string): void {
    if (this.#drives[id] === undefined) throw new Refusal(`Invalid device ID: ${id}`);
    this.#drives[id] = path;
  }

  #save({ snapshot_path: state, mem_file_path: memory }: SnapshotPaths): void {
    // src/vmm/src/vstate/vcpu.rs: a running vCPU does not answer with its state.
    if (this.#state !== 'Paused') throw new Refusal('save/restore unavailable while running');
    const saved = {
      version: this.#version,
      memoryMib: this.#memoryMib,
      hotplug: this.#hotplug,
      drives: this.#drives,
      interfaces: this.#interfaces,
      vsock: this.#vsock?.told,
    };
    writeSnapshot({ state: real(state), memory: real(memory) }, saved);
  }

  #load(request: LoadRequest): void {
    const { snapshot_path: state, mem_backend: backend, vsock_override: override, resume_vm: resume } = request;
    if (this.#configured) {
      throw new Refusal('Loading a microVM snapshot not allowed after configuring boot-specific resources.', true);
    }
    let saved: Saved;
    try {
      saved = readSnapshot({ state: real(state), memory: real(backend.backend_path) }, this.#version);
      for (const path of Object.values(saved.drives)) {
        if (!existsSync(real(path))) throw new Error(`No such file or directory (os error 2) ${path}`);
      }
      for (const { iface_id: id, host_dev_name: tap } of request.network_overrides ?? []) {
        // src/vmm/src/persist.rs, UnknownNetworkDevice.
        if (saved.interfaces[id] === undefined) throw new Error('Unknown Network Device.');
        saved.interfaces[id] = tap;
      }
      const told = override?.uds_path ?? saved.vsock;
      if (told !== undefined) this.#bindVsock(told);
    } catch (error) {
      throw new Refusal(`Load snapshot error: Failed to restore from snapshot: ${(error as Error).message}`, true);
    }
    this.#drives = { ...saved.drives };
    this.#interfaces = saved.interfaces;
    this.#memoryMib = saved.memoryMib;
    this.#hotplug = saved.hotplug;
    this.#state = resume ? 'Running' : 'Paused';
    if (resume) this.#call();
  }

  /** The body, checked as to its form and its moment. */
  #fieldsOf(name: string, id: string | undefined, body: unknown): Record<string, string> {
    const schema = bodies[name];
    if (schema === undefined) throw new Refusal(`Invalid request method and/or path: ${name}.`);
    const minor = Number(this.#version.split('.')[1]);
    if (minor < (requestsSince[name] ?? 0)) throw new Refusal(`Invalid request method and/or path: ${name}.`);
    for (const [field, since] of Object.entries(fieldsSince[name] ?? {})) {
      if (minor < since && Object.hasOwn(Object(body), field)) throw new Refusal(`unknown field \`${field}\``);
    }
    if (body === undefined) throw new Refusal(`Empty ${name.split(' ')[0]} request.`);
    const result = schema.safeParse(body);
    if (!result.success) {
      throw new Refusal(`An error occurred when deserializing the json body of a request: ${result.error.message}`);
    }
    const fields = result.data as Record<string, string>;
    if (id !== undefined && id !== (fields.drive_id ?? fields.iface_id)) {
      throw new Refusal('The id from the path does not match the id from the body!');
    }
    const isStarted = this.#state !== 'Not started';
    if ((name.startsWith('PATCH') || name === 'PUT /snapshot/create') !== isStarted) {
      const when = isStarted ? 'after' : 'before';
      throw new Refusal(`The requested operation is not supported ${when} starting the microVM.`);
    }
    return fields;
  }

  #bindVsock(path: string): void {
    const udsPath = real(path);
    if (existsSync(udsPath)) throw new Refusal('Cannot create backend for vsock device: Address in use (os error 98)');
    this.#vsock = { told: path, at: udsPath };
    const server = net.createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', (line) => {
        if (!/^connect \d+\n/i.test(line.toString())) {
          socket.destroy();
          return;
        }
        appendFileSync(`${this.#self}.connects`, line.toString());
        socket.write(`OK ${2 ** 30}\n`);
      });
    });
    server.listen(udsPath);
  }

  #start(): void {
    this.#state = 'Running';
    write(
      '--metrics-path',
      `${JSON.stringify({ utc_timestamp_ms: 1, put_api_requests: { drive_count: 11 }, vsock: { conn_event_fails: 2 } })}\n`,
    );
    const { boot_args: words } = this.#bootSource;
    // src/vmm/src/devices/pseudo/boot_timer.rs: what a guest writes there that is not 123 is a warning.
    if (process.argv.includes('--boot-timer') && words.includes('kiln.boot_timer=0xc0000000')) {
      write('--log-path', logLine('INFO', 'Guest-boot-time =  12345 us 12 ms,   6789 CPU us 6 CPU ms'));
    }
    for (let line = 0; this.#mode === 'noisy' && line < 10_000; line += 1)
      write('--log-path', logLine('WARN', 'noise'));
    if (this.#mode === 'guest-stops') {
      process.stdout.write('Kernel panic - not syncing\u001b[2J\r\n');
      write('--log-path', logLine('INFO', 'Firecracker exiting successfully. exit_code=0'));
      setImmediate(() => process.exit(0));
    } else this.#call();
  }

  /** What the agent does when it is up, and again at once when its first host has hung up. */
  #call(again = true): void {
    if (this.#vsock === undefined) return;
    const socket = net.connect(`${this.#vsock.at}_1024`).on('error', () => {});
    socket.write('hello');
    socket.on('connect', () => {
      if (again) socket.on('close', () => this.#call(false));
      socket.resume();
    });
  }
}

interface SnapshotPaths {
  readonly snapshot_path: string;
  readonly mem_file_path: string;
}

interface LoadRequest {
  readonly snapshot_path: string;
  readonly mem_backend: { readonly backend_path: string };
  readonly network_overrides?: readonly { readonly iface_id: string; readonly host_dev_name: string }[];
  readonly vsock_override?: { readonly uds_path: string };
  readonly resume_vm?: boolean;
}
