import { createHash, randomBytes } from 'node:crypto';
import { readdirSync, readlinkSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { TestNetwork } from '../support/network.ts';
import { busyboxBinary, cniPlugins } from '../support/paths.ts';
import type { EditableSpec } from '../support/scene.ts';
import { Lines, type RunningProgram } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

// ctr --cni has CNI's plugins put their interfaces into the network namespace of a container between its Create and its
// Start: they come when the VM has been there for a while.

const network = new TestNetwork();
afterAll(() => network[Symbol.dispose]());

const gateway = '10.88.0.1';
const gateway6 = 'fd00:88::1';
const hostLocal = (...subnets: string[]) => ({
  type: 'host-local',
  dataDir: network.ipamDir,
  ranges: subnets.map((subnet) => [{ subnet }]),
  routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
});
const bridge = {
  ...{ type: 'bridge', bridge: 'kt-br0', isGateway: true, hairpinMode: true },
  ipam: hostLocal('10.88.0.0/24', 'fd00:88::/64'),
};

/** A program for Node: a name server at the address in its first argument, for which every name has the same address. RFC 1035 */
const nameServer = `
const socket = require('node:dgram').createSocket('udp4');
socket.on('message', (query, { port, address }) => {
  const answer = Buffer.from('c00c000100010000003c00040a0b0c0d', 'hex');
  const head = Buffer.from([query[0], query[1], 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
  socket.send(Buffer.concat([head, query.subarray(12), answer]), port, address);
});
socket.bind(53, process.argv[1]);
`;

/** Nothing of a container's network is left in the network of the tests: no tap, no veth, no address that is in use. */
async function expectNoTrace(): Promise<void> {
  // The kernel takes a namespace apart some time after its last user.
  await vi.waitFor(
    () => {
      const links = network.ip('-o', 'link').trim().split('\n');
      expect(links.map((line) => line.split(': ')[1]).filter((name) => name !== 'lo' && name !== 'kt-br0')).toEqual([]);
    },
    { timeout: 10_000 },
  );
  for (const list of readdirSync(network.ipamDir)) {
    const taken = readdirSync(join(network.ipamDir, list)).filter((name) => !/^(last_reserved|lock)/.test(name));
    expect(taken).toEqual([]);
  }
}

describe('a container with a network of CNI', () => {
  const scene = useScene({ version: '2.1', network });
  beforeEach(() => network.configure({ name: 'kt', plugins: [bridge] }));
  afterEach(expectNoTrace);

  const end = async (id: string, program: RunningProgram) => {
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
    expect(await program.exit).toBe(137);
  };
  const inNetwork = (script: string) => scene.run(scene.id('net'), ['sh', '-c', script], { flags: ['--rm', '--cni'] });

  describe('and a server on the host’s side', () => {
    let servers: RunningProgram[];
    const content = randomBytes(32 * 2 ** 20);
    beforeAll(async () => {
      network.configure({ name: 'kt', plugins: [bridge] });
      // Makes the bridge.
      await scene.run(scene.id('net'), ['true'], { flags: ['--rm', '--cni'] });
      const directory = join(network.dir, 'www');
      await mkdir(directory);
      await writeFile(join(directory, 'data'), content);
      await writeFile(join(directory, 'hello'), 'from the host\n');
      const http = ['httpd', '-f', '-p', '[::]:8080', '-h', directory];
      const options = { timeout: 600_000 };
      servers = [
        network.stream(busyboxBinary(), http, options),
        network.stream(process.execPath, ['-e', nameServer, gateway], options),
      ];
    });
    afterAll(async () => {
      for (const server of servers) await server[Symbol.asyncDispose]();
    });

    it('has the interface that CNI has made, and reaches the host', async () => {
      const script = `ip address show eth0; ip route; wget -qO- http://${gateway}:8080/hello; wget -qO- http://[${gateway6}]:8080/hello`;
      const { stdout, stderr, code } = await inNetwork(script);
      const text = stdout.toString();
      expect(stderr).toBe('');
      expect(text).toMatch(/inet 10\.88\.0\.\d+\/24 brd 10\.88\.0\.255 scope global eth0/);
      expect(text).toMatch(/inet6 fd00:88::[0-9a-f]+\/64 scope global/);
      expect(text).toContain(`default via ${gateway} dev eth0`);
      expect(text.match(/from the host/g)).toHaveLength(2);
      expect(code).toBe(0);
    });

    it('sees no card but its own', async () => {
      const { stdout } = await inNetwork('ls /sys/class/net; cat /sys/class/net/eth0/mtu');
      expect(stdout.toString().split(/\s+/).filter(Boolean)).toEqual(['eth0', 'lo', '1500']);
    });

    it('sends and gets large packets, in pieces where they are larger than the MTU', async () => {
      const script = `ping -c 2 -s 1472 ${gateway} && ping -c 2 -s 8000 ${gateway} && ping6 -c 2 -s 8000 ${gateway6}`;
      const { stdout, code } = await inNetwork(script);
      expect(stdout.toString().match(/2 packets received|2 received/g)).toHaveLength(3);
      expect(code).toBe(0);
    });

    it('asks a name server, by UDP', async () => {
      const { stdout } = await inNetwork(`nslookup -type=a name.test ${gateway}`);
      expect(stdout.toString()).toContain('10.11.12.13');
    });

    it('gets 32 MiB with the right checksum', async () => {
      const { stdout } = await inNetwork(`wget -qO- http://${gateway}:8080/data | sha256sum`);
      expect(stdout.toString().split(' ')[0]).toBe(createHash('sha256').update(content).digest('hex'));
    });
  });

  const echoServer = ['sh', '-c', 'ip -4 address show eth0; exec nc -ll -p 7 -e cat'];
  /** Asks until the server is there. */
  const askIt = (nc: string, address: string) =>
    `for i in $(seq 100); do echo hello | ${nc} -w 2 ${address} 7 && break; done`;

  it('is reached by another container', async () => {
    const id = scene.id('server');
    // In the foreground, since `ctr run --detach` never takes a container's network back.
    const server = scene.runStream(id, echoServer, { flags: ['--rm', '--cni'] });
    const address = await addressIn(server);
    const { stdout } = await inNetwork(askIt('nc', address));
    expect(stdout.toString()).toBe('hello\n');
    await end(id, server);
  });

  it('is reached from the host’s side, also after kilnd was killed', async () => {
    const id = scene.id('server');
    const server = scene.runStream(id, echoServer, { flags: ['--rm', '--cni'] });
    const address = await addressIn(server);
    const ask = async () => {
      const { stdout } = await network.run('sh', ['-c', askIt(`${busyboxBinary()} nc`, address)]);
      return stdout.toString();
    };
    expect(await ask()).toBe('hello\n');
    for (const pid of scene.kilndPids()) process.kill(pid, 'SIGKILL');
    expect(await ask()).toBe('hello\n');
    await end(id, server);
  });

  it('has its ports published by what CNI has for it', async () => {
    // As nerdctl does it: a createRuntime hook that calls the plugins with the ports; and poststop, which takes it back.
    const plugin = (command: string, type: string, config: object, id: string) =>
      `echo '${JSON.stringify({ cniVersion: '1.0.0', name: 'kt', type, ...config })}' | CNI_COMMAND=${command} CNI_CONTAINERID=${id} CNI_IFNAME=eth0 CNI_PATH=${cniPlugins()} CNI_NETNS=/proc/$pid/ns/net ${join(cniPlugins(), type)}`;
    const id = scene.id('published');
    const { type: _, ...bridgeConfig } = bridge;
    const portmap = { runtimeConfig: { portMappings: [{ hostPort: 8007, containerPort: 7, protocol: 'tcp' }] } };
    const pid = `pid=$(sed 's/.*"pid":\\([0-9]*\\).*/\\1/')`;
    const env = ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'];
    const added = join(network.dir, 'added');
    const add = [
      ...[pid, `${plugin('ADD', 'bridge', bridgeConfig, id)} >${added}`],
      `result=$(tr -d '\\n' <${added})`,
      plugin('ADD', 'portmap', portmap, id).replace(/\}' \|/, `,"prevResult":'"$result"'}' |`),
    ].join('; ');
    const remove = [plugin('DEL', 'portmap', portmap, id), plugin('DEL', 'bridge', bridgeConfig, id)].join('; ');
    await scene.createWithSpec(id, ['nc', '-ll', '-p', '7', '-e', 'cat'], (spec) => {
      const hook = (script: string) => ({ path: '/bin/sh', args: ['sh', '-c', script], env });
      Object.assign(spec, { hooks: { createRuntime: [hook(add)], poststop: [hook(remove)] } });
      return undefined;
    });
    await scene.ctr(['task', 'start', '--detach', '--fifo-dir', scene.fifoDir, id]);
    // From another namespace than the ports' own, as from another machine.
    const { stdout } = await inNetwork(askIt('nc', `${gateway}`).replace(' 7 ', ' 8007 '));
    expect(stdout.toString()).toBe('hello\n');
    await scene.remove(id);
    expect(network.sh('iptables -t nat -S')).not.toContain('8007');
  });

  it('is not started when a plugin fails, and the plugin’s words are told', async () => {
    network.configure({ name: 'kt', plugins: [{ ...bridge, mtu: 'large' }] });
    const { code, stderr } = await inNetwork('true');
    expect(stderr).toContain('mtu');
    expect(code).not.toBe(0);
  });

  it('is not started when its namespace has more interfaces than the VM has cards', async () => {
    // A pair whose both ends are in the namespace, in two hooks.
    const id = scene.id('net');
    const line = 'ip link add x0 type veth peer name x1';
    const pid = `pid=$(sed 's/.*"pid":\\([0-9]*\\).*/\\1/')`;
    const hook = {
      path: '/bin/sh',
      args: ['sh', '-c', `${pid}; nsenter --net=/proc/$pid/ns/net ${line}`],
      env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
    };
    await scene.createWithSpec(
      id,
      ['true'],
      (spec) => void Object.assign(spec, { hooks: { createRuntime: [hook, hook3(hook)] } }),
    );
    const { code, stderr } = await scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, id]);
    await scene.ctr(['container', 'rm', id]);
    expect(stderr).toMatch(/its VM has network cards for 2 interfaces, but there are 4: (x[0-3](, )?){4}/);
    expect(code).toBe(1);
  });

  /** As `hook`, with other names. */
  function hook3(hook: { readonly path: string; readonly args: readonly string[]; readonly env: readonly string[] }) {
    return { ...hook, args: hook.args.map((argument) => argument.replace('x0', 'x2').replace('x1', 'x3')) };
  }

  it('has a network of ptp, whose gateway is reached by a route of its own', async () => {
    const ptp = { type: 'ptp', ipam: hostLocal('10.89.0.0/24', 'fd00:89::/64') };
    network.configure({ name: 'kt', plugins: [ptp] });
    const { stdout, stderr } = await inNetwork('ip route; ping -c 1 10.89.0.1 && ping6 -c 1 fd00:89::1');
    expect(stderr).toBe('');
    expect(stdout.toString()).toMatch(/^default via 10\.89\.0\.1 dev eth0/m);
    expect(stdout.toString()).toMatch(/^10\.89\.0\.1 dev eth0/m);
    expect(stdout.toString().match(/1 packets received/g)).toHaveLength(2);
  });

  it('gets and sends no faster than the plugin bandwidth lets it', async () => {
    const rates = { ingressRate: 16_000_000, ingressBurst: 1_000_000, egressRate: 16_000_000, egressBurst: 1_000_000 };
    network.configure({ name: 'kt', plugins: [bridge, { type: 'bandwidth', ...rates }] });
    // 4 MiB at 2 MB/s, in the guest's own time.
    const timed = (what: string) =>
      `a=$(cut -d' ' -f1 /proc/uptime); ${what}; b=$(cut -d' ' -f1 /proc/uptime); echo $a $b`;
    const script = [
      timed(`nc ${gateway} 9000 </dev/null | wc -c`),
      timed(`head -c 4194304 /dev/zero | nc ${gateway} 9001`),
    ].join('; ');
    const listen = (port: number, program: string) =>
      network.stream(busyboxBinary(), ['nc', '-ll', '-p', String(port), '-e', 'sh', '-c', program], {
        timeout: 60_000,
      });
    await using _source = listen(9000, 'head -c 4194304 /dev/zero');
    await using _sink = listen(9001, 'cat >/dev/null');
    const { stdout, stderr } = await inNetwork(script);
    expect(stderr).toBe('');
    const [bytes, ...times] = stdout.toString().trim().split('\n');
    expect(bytes).toBe('4194304');
    const seconds = times.map((line) => line.split(' ').map(Number)).map(([from = 0, to = 0]) => to - from);
    expect(seconds).toHaveLength(2);
    for (const took of seconds) expect(took).toBeGreaterThan(1.4);
  });

  /** What this host's kernel has. */
  const hasIpvlan = (() => {
    try {
      network.sh(
        'ip link add kt-i0 type veth peer name kt-i1 && ip link add link kt-i0 name kt-i2 type ipvlan mode l2',
      );
      return true;
    } catch {
      return false;
    } finally {
      network.sh('ip link del kt-i0');
    }
  })();

  it.skipIf(!hasIpvlan)('has a network of ipvlan', async () => {
    network.sh('ip link add kt-m0 type veth peer name kt-m1; ip link set kt-m0 up; ip link set kt-m1 up');
    network.ip('address', 'add', '10.93.0.1/24', 'dev', 'kt-m1');
    const ipam = { ...hostLocal('10.93.0.0/24'), ranges: [[{ subnet: '10.93.0.0/24', rangeStart: '10.93.0.2' }]] };
    network.configure({ name: 'kt', plugins: [{ type: 'ipvlan', master: 'kt-m0', mode: 'l2', ipam }] });
    const { stdout, stderr } = await inNetwork('ping -c 2 -s 1400 10.93.0.1');
    network.ip('link', 'del', 'kt-m0');
    expect(stderr).toBe('');
    expect(stdout.toString()).toContain('2 packets received');
  });

  it('has a network of macvlan', async () => {
    network.sh('ip link add kt-m0 type veth peer name kt-m1; ip link set kt-m0 up; ip link set kt-m1 up');
    network.ip('address', 'add', '10.91.0.1/24', 'dev', 'kt-m1');
    const ipam = { ...hostLocal('10.91.0.0/24'), ranges: [[{ subnet: '10.91.0.0/24', rangeStart: '10.91.0.2' }]] };
    network.configure({ name: 'kt', plugins: [{ type: 'macvlan', master: 'kt-m0', mode: 'bridge', ipam }] });
    const { stdout, stderr } = await inNetwork('ping -c 2 -s 1400 10.91.0.1');
    network.ip('link', 'del', 'kt-m0');
    expect(stderr).toBe('');
    expect(stdout.toString()).toContain('2 packets received');
  });

  it('has nothing but loopback when there is no network', async () => {
    const { stdout } = await scene.run(scene.id('none'), ['sh', '-c', 'ls /sys/class/net; ip -o link']);
    expect(stdout.toString()).toMatch(/^lo\n1: lo: .*\n$/);
  });

  it('keeps a namespace whose name goes after Create, and is refused one that is gone before', async () => {
    await using holder = network.stream('unshare', ['--net', 'sleep', '600'], { timeout: 600_000 });
    const path = `/proc/${holder.pid}/ns/net`;
    const own = readlinkSync('/proc/self/ns/net');
    await vi.waitFor(() => expect([own, network.identity]).not.toContain(readlinkSync(path)));
    network.ip('link', 'add', 'kt-veth', 'type', 'veth', 'peer', 'name', 'eth7', 'netns', path);
    network.sh(`nsenter --net=${path} ip address add 10.90.0.2/24 dev eth7`);
    const hook = {
      path: '/bin/sh',
      args: ['sh', '-c', `kill -KILL ${holder.pid}; while [ -e ${path} ]; do sleep 0.01; done`],
      env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
    };
    const joining = (spec: EditableSpec, hooks = {}): void => {
      const namespace = spec.linux.namespaces.find(({ type }) => type === 'network');
      Object.assign(namespace ?? {}, { path });
      Object.assign(spec, { hooks });
    };
    const command = ['ip', '-4', 'address', 'show', 'eth7'];
    const kept = await scene.runWithSpec(
      scene.id('kept'),
      command,
      (spec) => void joining(spec, { createRuntime: [hook] }),
    );
    expect(kept.stderr).toBe('');
    expect(kept.stdout.toString()).toContain('inet 10.90.0.2/24');
    const gone = await scene.runWithSpec(scene.id('gone'), command, (spec) => void joining(spec));
    expect(gone.code).not.toBe(0);
    expect(gone.stderr).toContain(`cannot open the network namespace ${path}: No such file or directory`);
  });

  it('takes over what comes, changes and goes while it runs', async () => {
    await using holder = network.stream('unshare', ['--net', 'sleep', '600'], { timeout: 600_000 });
    const path = `/proc/${holder.pid}/ns/net`;
    const own = readlinkSync('/proc/self/ns/net');
    await vi.waitFor(() => expect([own, network.identity]).not.toContain(readlinkSync(path)));
    const inside = (line: string) => network.sh(`nsenter --net=${path} ${line}`);
    const id = scene.id('later');
    await scene.start(id, ['sleep', '100000'], { flags: ['--with-ns', `network:${path}`] });
    const guest = async (...command: string[]) =>
      scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', scene.id('exec'), id, ...command]);
    const shows = (command: string, ...expected: (string | RegExp)[]) =>
      vi.waitFor(
        async () => {
          const text = await guest('sh', '-c', command);
          for (const each of expected) expect(text).toMatch(each);
        },
        { timeout: 20_000, interval: 200 },
      );
    network.sh(
      'ip link add kt-veth type veth peer name eth7; ip link set kt-veth up; ip address add 10.92.0.1/24 dev kt-veth',
    );
    network.ip('link', 'set', 'eth7', 'netns', path);
    inside('ip address add 10.92.0.2/24 dev eth7');
    inside('ip link set eth7 up');
    await shows('ip -4 address; ping -c 1 -W 5 10.92.0.1', '10.92.0.2/24', /eth7/, '1 packets received');
    inside('ip address add 10.92.0.3/24 dev eth7');
    inside('ip address del 10.92.0.2/24 dev eth7');
    // With the first address of the subnet the second one went.
    inside('ip address replace 10.92.0.3/24 dev eth7');
    inside('ip link set eth7 down');
    inside('ip link set eth7 name net0 up');
    inside('ip route replace default via 10.92.0.1');
    await shows(
      'ip -4 address show net0; ip route',
      '10.92.0.3/24',
      /default via 10\.92\.0\.1/,
      /^(?![\s\S]*10\.92\.0\.2\/)/,
    );
    network.ip('link', 'del', 'kt-veth');
    await shows('ls /sys/class/net', /^lo\s*$/);
    await scene.remove(id);
    expect(inside('ip -o link')).not.toContain('kiln-tap');
  });

  it('has what is in a namespace that its spec names, and leaves it as it was', async () => {
    await using holder = network.stream('unshare', ['--net', 'sleep', '600'], { timeout: 600_000 });
    const path = `/proc/${holder.pid}/ns/net`;
    const own = readlinkSync('/proc/self/ns/net');
    await vi.waitFor(() => expect([own, network.identity]).not.toContain(readlinkSync(path)));
    network.ip('link', 'add', 'kt-veth', 'type', 'veth', 'peer', 'name', 'eth7', 'netns', path);
    const inside = (line: string) => network.sh(`nsenter --net=${path} ${line}`);
    inside('ip address add 10.90.0.2/24 dev eth7');
    inside('ip link set eth7 up');
    network.ip('link', 'set', 'kt-veth', 'up');
    const flags = ['--rm', '--with-ns', `network:${path}`];
    for (const attempt of ['first', 'second']) {
      const { stdout } = await scene.run(scene.id(attempt), ['ip', '-4', 'address', 'show', 'eth7'], { flags });
      expect(stdout.toString()).toContain('inet 10.90.0.2/24');
    }
    expect(inside('tc qdisc show')).not.toContain('ingress');
    expect(inside('ip -o link')).not.toContain('kiln-tap');
    network.ip('link', 'del', 'kt-veth');
  });
});

/** The IPv4 address that a container's `ip address` tells first. */
async function addressIn(program: RunningProgram): Promise<string> {
  const line = await new Lines(program.stdout).waitFor((each) => each.includes('inet '), 'address');
  return /inet ([\d.]+)/.exec(line)?.[1] ?? '';
}
