/**
 * Firecracker's API: HTTP/1.1 over a Unix socket (firecracker.yaml of v1.16; src/firecracker/src/api_server). Only the
 * requests that Kiln makes, each with the fields that every version from `oldestVersion` on knows: an unknown field is
 * refused (`deny_unknown_fields`).
 */
import http from 'node:http';
import { KilnError } from '../../errors.ts';
import type { HeldSocket } from './socket-path.ts';

/** Answers have some hundred bytes; a Firecracker that was taken over may send what it likes. */
const maxAnswerBytes = 1 << 20;

/** Body of each request, by method and path. Units and limits are those of firecracker.yaml. */
export interface FirecrackerRequests {
  'PUT /machine-config': {
    readonly vcpu_count: number;
    readonly mem_size_mib: number;
    /** "2M": from hugetlbfs' pool; the memory is then a multiple of 2 MiB. Since 1.7. */
    readonly huge_pages?: '2M';
  };
  'PUT /boot-source': {
    readonly kernel_image_path: string;
    readonly initrd_path?: string;
    readonly boot_args: string;
  };
  'PUT /drives': {
    readonly drive_id: string;
    readonly path_on_host: string;
    readonly is_root_device: false;
    readonly is_read_only: boolean;
    /** `Unsafe`, the default, ignores the guest's flushes. */
    readonly cache_type: 'Unsafe' | 'Writeback';
    readonly rate_limiter?: RateLimiter;
  };
  /** Swaps the backing file of a running VM's drive. */
  'PATCH /drives': { readonly drive_id: string; readonly path_on_host: string };
  /** `host_dev_name` is a tap device of the network namespace that Firecracker runs in. */
  'PUT /network-interfaces': {
    readonly iface_id: string;
    readonly host_dev_name: string;
    readonly guest_mac: string;
    readonly rx_rate_limiter?: RateLimiter;
    readonly tx_rate_limiter?: RateLimiter;
  };
  /** Of the guest's console, whose output goes to Firecracker's own where no path is given. The limit since 1.16; of bytes. */
  'PUT /serial': { readonly rate_limiter: TokenBucket };
  'PUT /vsock': { readonly guest_cid: number; readonly uds_path: string };
  /** `free_page_reporting` since 1.14. */
  'PUT /balloon': {
    readonly amount_mib: number;
    readonly deflate_on_oom: boolean;
    readonly free_page_reporting: boolean;
  };
  /** A multiple of 128 MiB, the size of a slot; since 1.14. */
  'PUT /hotplug/memory': { readonly total_size_mib: number };
  /** Of a running VM: a multiple of 2 MiB, the size of a block. The guest takes it by and by. */
  'PATCH /hotplug/memory': { readonly requested_size_mib: number };
  'PUT /entropy': Readonly<Record<string, never>>;
  'PUT /actions': { readonly action_type: 'InstanceStart' };
  'PATCH /vm': { readonly state: 'Paused' };
  /** Of a paused VM. */
  'PUT /snapshot/create': {
    readonly snapshot_type: 'Full';
    readonly snapshot_path: string;
    readonly mem_file_path: string;
  };
  /** Before anything is configured. `vsock_override` since 1.16. */
  'PUT /snapshot/load': {
    readonly snapshot_path: string;
    /** "File": mapped privately. */
    readonly mem_backend: { readonly backend_type: 'File'; readonly backend_path: string };
    readonly resume_vm: true;
    /** The tap of each interface, in place of the saved VM's. Since 1.12. */
    readonly network_overrides?: readonly { readonly iface_id: string; readonly host_dev_name: string }[];
    readonly vsock_override?: { readonly uds_path: string };
  };
}

/** A request and its body. */
export type FirecrackerRequest = {
  [Name in keyof FirecrackerRequests]: readonly [name: Name, body: FirecrackerRequests[Name]];
}[keyof FirecrackerRequests];

/** Of bytes, and of requests. A bucket that is missing does not limit. */
export interface RateLimiter {
  readonly bandwidth?: TokenBucket;
  readonly ops?: TokenBucket;
}

/** `size` tokens at first, and as many again in `refill_time` ms. */
export interface TokenBucket {
  readonly size: number;
  readonly refill_time: number;
}

/** GET / */
export interface InstanceInfo {
  readonly state: 'Not started' | 'Running' | 'Paused';
}

/** GET /hotplug/memory */
export interface HotplugMemory {
  readonly requested_size_mib: number;
  readonly plugged_size_mib: number;
}

/** Of a drive or an interface, which the path names, too. */
function idIn(body: object): string {
  if ('drive_id' in body) return `/${body.drive_id}`;
  return 'iface_id' in body ? `/${body.iface_id}` : '';
}

export class FirecrackerApi implements Disposable {
  readonly #socket: HeldSocket;
  /** One connection: Firecracker handles one request after the other anyway. */
  readonly #agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

  /** Takes the socket over. */
  constructor(socket: HeldSocket) {
    this.#socket = socket;
  }

  /** As in "1.16.1"; a build of a developer may have a suffix. */
  async version(signal?: AbortSignal): Promise<string> {
    const answer = (await this.#request('GET', '/version', undefined, signal)) as { firecracker_version?: unknown };
    return String(answer?.firecracker_version);
  }

  async describe(signal?: AbortSignal): Promise<InstanceInfo> {
    return (await this.#request('GET', '/', undefined, signal)) as InstanceInfo;
  }

  /** Of a VM that was given such memory before its start. */
  async hotplugMemory(signal?: AbortSignal): Promise<HotplugMemory> {
    return (await this.#request('GET', '/hotplug/memory', undefined, signal)) as HotplugMemory;
  }

  /**
   * Makes one request. The id of a drive goes into the path, too.
   *
   * @throws KilnError internal with Firecracker's words when it refuses, unavailable when it does not answer, the signal's
   * reason when that aborts
   */
  async call<Name extends keyof FirecrackerRequests>(
    name: Name,
    body: FirecrackerRequests[Name],
    signal?: AbortSignal,
  ): Promise<void> {
    const [method = '', path = ''] = name.split(' ');
    await this.#request(method, `${path}${idIn(body)}`, body, signal);
  }

  #request(method: string, path: string, body?: object, signal?: AbortSignal): Promise<unknown> {
    const text = body === undefined ? undefined : JSON.stringify(body);
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    const lost = (error: Error) => {
      if (signal?.aborted) reject(signal.reason);
      else {
        const message = `Firecracker did not answer ${method} ${path}: ${error.message}`;
        reject(new KilnError('unavailable', message, { cause: error }));
      }
    };
    const request = http.request({
      ...{ socketPath: this.#socket.path, agent: this.#agent, method, path },
      ...(signal === undefined ? {} : { signal }),
      // A body without its length, which Node sends in chunks, counts as none.
      headers:
        text === undefined ? {} : { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(text) },
    });
    request.on('error', lost);
    request.on('response', (response) => {
      const chunks: Buffer[] = [];
      let bytes = 0;
      response.on('data', (chunk: Buffer) => {
        bytes += chunk.length;
        if (bytes > maxAnswerBytes) response.destroy(new Error('the answer is too long'));
        else chunks.push(chunk);
      });
      response.on('error', lost);
      response.on('end', () => {
        const answer = Buffer.concat(chunks).toString();
        const status = response.statusCode ?? 0;
        if (status < 300) resolve(answer === '' ? undefined : parse(answer));
        else reject(new KilnError('internal', `Firecracker refused ${method} ${path}: ${faultOf(answer)}`));
      });
    });
    request.end(text);
    return promise;
  }

  [Symbol.dispose](): void {
    this.#agent.destroy();
    this.#socket[Symbol.dispose]();
  }
}

function faultOf(answer: string): string {
  const { fault_message: fault } = (parse(answer) ?? {}) as { fault_message?: unknown };
  return typeof fault === 'string' ? fault.trim() : answer.trim() || '(without a reason)';
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
