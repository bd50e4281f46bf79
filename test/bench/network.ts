/**
 * What a container's network carries, beside runc's: iperf3 (TCP, one connection) between the container and a namespace that
 * stands for the host, over a veth pair; and through `localhost` of the container's namespace.
 */
import { importImage } from '../support/images.ts';
import { iperf3Command, iperf3Image, iperf3InImage } from '../support/iperf3.ts';
import { TestNetwork } from '../support/network.ts';
import { iperf3Tree } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { mustRun } from '../support/spawn.ts';
import { table } from './statistics.ts';
import { kiln, runc } from './ways.ts';

/** In Mbit/s: out of the container and into it, over its interface and through localhost. */
interface Throughput {
  readonly out: number;
  readonly into: number;
  readonly localhostOut: number;
  readonly localhostInto: number;
  /** The round trip of a packet, in ms: the average of 20. */
  readonly pingMs: number;
}

export interface NetworkUse {
  readonly seconds: number;
  readonly kiln: Throughput;
  readonly runc: Throughput;
}

const subnetOf = { [kiln]: '10.94.1', [runc]: '10.94.2' } as const;

/** Each measurement takes so many seconds. */
export async function measureNetwork(scene: Scene, seconds: number): Promise<NetworkUse> {
  await scene.configure('');
  await importImage(scene.containerd, iperf3Image);
  using network = new TestNetwork();
  const of = (runtime: typeof kiln | typeof runc) => measure(scene, network, runtime, seconds);
  return { seconds, kiln: await of(kiln), runc: await of(runc) };
}

async function measure(
  scene: Scene,
  network: TestNetwork,
  runtime: typeof kiln | typeof runc,
  seconds: number,
): Promise<Throughput> {
  const options = { timeout: 600_000 };
  await using holder = network.stream('unshare', ['--net', 'sleep', '600'], options);
  const namespace = `/proc/${holder.pid}/ns/net`;
  const subnet = subnetOf[runtime];
  const enter = ['nsenter', `--net=${namespace}`];
  await connect(network, namespace, subnet);
  const [loader = '', ...args] = iperf3Command(iperf3Tree());
  await using _server = network.stream(loader, [...args, '--server', '--bind', `${subnet}.1`], options);
  const id = scene.id('iperf3');
  await scene.start(id, [...iperf3InImage, '--server'], {
    ...{ runtime, image: iperf3Image.name },
    flags: ['--with-ns', `network:${namespace}`],
  });
  const exec = async (...command: string[]) =>
    scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', scene.id('exec'), id, ...command]);
  const client = ['--json', '--time', String(seconds)];
  const over = async (...more: string[]) =>
    mbitsOf(await exec(...iperf3InImage, '--client', `${subnet}.1`, ...client, ...more));
  const local = async (...more: string[]) => {
    const [program = '', ...rest] = [...enter, loader, ...args, '--client', '127.0.0.1', ...client, ...more];
    return mbitsOf((await mustRun(program, rest, options)).stdout.toString());
  };
  const result = {
    out: await over(),
    into: await over('--reverse'),
    localhostOut: await local('--reverse'),
    localhostInto: await local(),
    pingMs: pingOf(await exec('ping', '-c', '20', '-i', '0.2', `${subnet}.1`)),
  };
  await scene.remove(id);
  return result;
}

/** A veth pair into the namespace, with addresses, as CNI's plugin ptp makes it. */
async function connect(network: TestNetwork, namespace: string, subnet: string): Promise<void> {
  const name = `kt-${subnet.slice(-1)}`;
  network.ip('link', 'add', name, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', namespace);
  network.ip('address', 'add', `${subnet}.1/24`, 'dev', name);
  network.ip('link', 'set', name, 'up');
  const inside = (...command: string[]) => network.sh(`nsenter --net=${namespace} ${command.join(' ')}`);
  inside('ip link set lo up');
  inside('ip link set eth0 up');
  inside(`ip address add ${subnet}.2/24 dev eth0`);
}

/** What arrived, of iperf3's report. */
function mbitsOf(report: string): number {
  const { end, error } = JSON.parse(report) as { end: { sum_received: { bits_per_second: number } }; error?: string };
  if (error !== undefined) throw new Error(`iperf3: ${error}`);
  return end.sum_received.bits_per_second / 1e6;
}

/** busybox: "round-trip min/avg/max = 0.1/0.2/0.3 ms". */
function pingOf(report: string): number {
  const average = /min\/avg\/max = [\d.]+\/([\d.]+)\//.exec(report)?.[1];
  if (average === undefined) throw new Error(`ping: ${report}`);
  return Number(average);
}

export function describeNetwork({ seconds, kiln: ours, runc: theirs }: NetworkUse): string {
  const row = (name: string, key: keyof Throughput): string[] => {
    const digits = key === 'pingMs' ? 2 : 0;
    const ratio = ours[key] / theirs[key];
    return [name, ours[key].toFixed(digits), theirs[key].toFixed(digits), ratio.toFixed(ratio < 0.1 ? 3 : 2)];
  };
  return [
    `\na container's network, iperf3 with one TCP connection for ${seconds} s each, in Mbit/s`,
    table([
      ['', 'kiln', 'runc', 'kiln / runc'],
      row('out of the container', 'out'),
      row('into the container', 'into'),
      row('out, through localhost', 'localhostOut'),
      row('into, through localhost', 'localhostInto'),
      row('ping, average in ms', 'pingMs'),
    ]),
  ].join('\n');
}
