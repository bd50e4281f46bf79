/**
 * A network for tests that is not the machine's: a namespace in which a private containerd and everything that it starts
 * lives, so that bridges, addresses and firewall rules that CNI's plugins make there are nobody else's.
 *
 * `ctr run --cni` runs the plugins itself, and looks for them and their configuration where nobody can tell it (/opt/cni/bin,
 * /etc/cni/net.d; go-cni). So it gets a mount namespace, too, in which these folders are the test's.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { NetworkNamespace } from '../../src/sys/netns.ts';
import { cniPlugins } from './paths.ts';
import { type RunningProgram, type RunOptions, type RunResult, run, stream } from './spawn.ts';

/** A list of plugins as it stands in a file of /etc/cni/net.d. */
export interface CniList {
  readonly name: string;
  readonly plugins: readonly Readonly<Record<string, unknown>>[];
}

/** $1: the test's folder. Nothing of it is seen outside of the mount namespace. */
const withCni = `set -e
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc-work" /etc
mount -t overlay overlay -o "lowerdir=/var/lib,upperdir=$1/var,workdir=$1/var-work" /var/lib
mount -t tmpfs tmpfs /opt
mkdir -p /etc/cni/net.d /opt/cni /var/lib/cni
mount --bind "$1/../net.d" /etc/cni/net.d
ln -s "$2" /opt/cni/bin
shift 2
exec "$@"`;

export class TestNetwork implements Disposable {
  readonly dir: string;
  readonly #namespace: NetworkNamespace;

  constructor() {
    this.dir = mkdtempSync(join(tmpdir(), 'kt-net-'));
    for (const name of ['net.d', 'scratch', 'ipam']) mkdirSync(join(this.dir, name));
    this.#namespace = NetworkNamespace.create();
    this.ip('link', 'set', 'lo', 'up');
    this.sh('echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding');
  }

  /** What names the namespace: "net:[4026532008]". */
  get identity(): string {
    return this.#namespace.identity;
  }

  /** What goes before the commands of containerd and `ctr`. */
  get commands(): { readonly containerd: readonly string[]; readonly ctr: readonly string[] } {
    const scratch = join(this.dir, 'scratch');
    // The upper folders of an overlay lie on a file system of their own, made anew for each command.
    const prepare = `mount -t tmpfs tmpfs ${scratch}; cd ${scratch}; mkdir etc etc-work var var-work; `;
    return {
      containerd: this.#enter,
      ctr: [...this.#enter, 'unshare', '--mount', 'sh', '-c', prepare + withCni, 'sh', scratch, cniPlugins()],
    };
  }

  get #enter(): readonly string[] {
    return ['nsenter', `--net=/proc/${process.pid}/fd/${this.#namespace.fd}`];
  }

  /** Has `ctr run --cni` use this network from now on. */
  configure(list: CniList): void {
    const text = JSON.stringify({ cniVersion: '1.0.0', ...list });
    writeFileSync(join(this.dir, 'net.d', '10-test.conflist'), text);
  }

  /** Where the plugin host-local notes which addresses are in use. */
  get ipamDir(): string {
    return join(this.dir, 'ipam');
  }

  /** Runs a program in the network, to its end. */
  run(file: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
    const [program = '', ...before] = this.#enter;
    return run(program, [...before, file, ...args], options);
  }

  /** Starts a program in the network. */
  stream(file: string, args: readonly string[], options: RunOptions & { interactive?: boolean } = {}): RunningProgram {
    const [program = '', ...before] = this.#enter;
    return stream(program, [...before, file, ...args], options);
  }

  /** ip(8) in the network; its output. */
  ip(...args: string[]): string {
    return this.#must('ip', args);
  }

  /** A line for the shell, in the network; its output. */
  sh(line: string): string {
    return this.#must('sh', ['-c', line]);
  }

  #must(program: string, args: readonly string[]): string {
    const { status, stdout, stderr } = this.#namespace.run(() => spawnSync(program, args, { encoding: 'utf8' }));
    if (status !== 0) throw new Error(`${program} ${args.join(' ')} ended with ${status}: ${stderr}`);
    return stdout;
  }

  [Symbol.dispose](): void {
    this.#namespace[Symbol.dispose]();
    rmSync(this.dir, { recursive: true, force: true });
  }
}
