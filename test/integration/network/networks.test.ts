import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { closeSync, readdirSync, readSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { GuestNetwork } from '../../../agent/network.ts';
import { Network } from '../../../gen/kiln/agent/v1/agent.ts';
import type { NetworkConfig } from '../../../src/network/config.ts';
import { type Card, type ConnectedNetwork, networks } from '../../../src/network/networks.ts';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { openTap } from '../../../src/sys/tap.ts';
import { Lines, stream } from '../../support/spawn.ts';

// Everything happens in namespaces of the test's own: one for the taps, one that is a sandbox's, with one end of a veth
// pair, as CNI's bridge plugin makes it, whose other end is in a namespace that plays the host, and one that plays the guest.

const cards: Card[] = [
  { mac: '02:6b:69:6c:6e:00', tap: 'kt0' },
  { mac: '02:6b:69:6c:6e:01', tap: 'kt1' },
];

let disposal: DisposableStack;
let parking: NetworkNamespace;
let sandbox: NetworkNamespace;
let host: NetworkNamespace;
let taps: number[];
/** Is in the namespace where taps wait, as a VMM is. */
let vmm: ChildProcess;

beforeEach(() => {
  disposal = new DisposableStack();
  [parking, sandbox, host] = [1, 2, 3].map(() => disposal.use(NetworkNamespace.create())) as [
    NetworkNamespace,
    NetworkNamespace,
    NetworkNamespace,
  ];
  taps = parking.run(() => cards.map(({ tap }) => openTap(tap)));
  disposal.defer(() => taps.forEach((tap) => void closeSync(tap)));
  vmm = parking.run(() => spawn('sleep', ['600'], { stdio: 'ignore' }));
  disposal.defer(() => void vmm.kill('SIGKILL'));
});
afterEach(() => disposal.dispose());

/** ip(8) in a namespace. */
function ip(namespace: NetworkNamespace, ...args: string[]): string {
  const { status, stdout, stderr } = namespace.run(() => spawnSync('ip', args, { encoding: 'utf8' }));
  if (status !== 0) throw new Error(`ip ${args.join(' ')}: ${stderr}`);
  return stdout;
}

/** A veth pair between the sandbox's namespace and the host's. */
function veth(name: string, peer: string, mac: string): void {
  ip(host, 'link', 'add', peer, 'type', 'veth', 'peer', 'name', name, 'address', mac, 'netns', pathOf(sandbox));
  ip(host, 'link', 'set', peer, 'up');
  ip(sandbox, 'link', 'set', name, 'up');
}

const pathOf = (namespace: NetworkNamespace) => `/proc/${process.pid}/fd/${namespace.fd}`;
const vm = (moved: number[] = []) => ({
  pid: vmm.pid ?? 0,
  nics: cards,
  cardMoved: (card: number) => void moved.push(card),
});
const attach = (id = 'c', path = pathOf(sandbox)): ConnectedNetwork => networks.attach(id, vm(), path);

/** What becomes of a TCP connection from the host's side, to a port where nobody listens. */
function knock(): string {
  const options = { encoding: 'utf8', timeout: 2000 } as const;
  return host.run(() => spawnSync('bash', ['-c', 'echo >/dev/tcp/10.9.0.2/9'], options)).stderr;
}

/** Runs a program for Node in a namespace, at least until it has said a line. */
async function nodeIn(namespace: NetworkNamespace, program: string) {
  const running = stream('nsenter', [`--net=${pathOf(namespace)}`, process.execPath, '-e', program], {
    timeout: 60_000,
  });
  const said = await new Lines(running.stdout).waitFor(() => true, 'its first line');
  return { said, [Symbol.asyncDispose]: () => running[Symbol.asyncDispose]() };
}

function asMessage(config: NetworkConfig): Network {
  return Network.fromPartial(config as Parameters<typeof Network.fromPartial>[0]);
}

function inWords({ interfaces, routes, neighbours }: NetworkConfig) {
  const dotted = (address: Uint8Array) =>
    address.length === 4 ? address.join('.') : Buffer.from(address).toString('hex');
  return {
    interfaces: interfaces.map(({ cardMac, name, mac, mtu, addresses }) => {
      const all = addresses.map(({ local, prefixLength }) => `${dotted(local)}/${prefixLength}`);
      return `${name} ${mac} ${mtu} ${cardMac} ${all.join(' ')}`;
    }),
    routes: routes.map(
      (route) => `${dotted(route.destination)}/${route.prefixLength} ${dotted(route.gateway)} ${route.interface}`,
    ),
    neighbours: neighbours.map(({ address, mac, interface: name }) => `${dotted(address)} ${mac} ${name}`),
  };
}

describe('a sandbox whose namespace has an interface', () => {
  beforeEach(() => {
    veth('eth0', 'h0', '02:00:00:00:00:42');
    ip(sandbox, 'link', 'set', 'eth0', 'mtu', '1400');
    ip(sandbox, 'address', 'add', '10.9.0.2/24', 'broadcast', '10.9.0.255', 'dev', 'eth0');
    ip(sandbox, 'address', 'add', 'fd00:9::2/64', 'nodad', 'dev', 'eth0');
    ip(sandbox, 'route', 'add', '10.1.0.0/16', 'via', '10.9.0.7', 'metric', '5');
    ip(sandbox, 'route', 'add', 'default', 'via', '10.9.0.1');
    ip(sandbox, 'route', 'add', '169.254.1.1', 'dev', 'eth0', 'scope', 'link');
    ip(sandbox, 'route', 'add', 'default', 'via', 'fd00:9::1');
    ip(sandbox, 'neighbour', 'add', '10.9.0.1', 'lladdr', '02:00:00:00:00:01', 'dev', 'eth0');
  });

  test('hands all that is configured over to the guest, in an order in which it can be set', async () => {
    await using network = attach();
    expect(inWords((await network.connect())!)).toEqual({
      interfaces: ['eth0 02:00:00:00:00:42 1400 02:6b:69:6c:6e:00 10.9.0.2/24 fd000009000000000000000000000002/64'],
      routes: [
        '169.254.1.1/32  eth0',
        '10.1.0.0/16 10.9.0.7 eth0',
        '/0 10.9.0.1 eth0',
        '/0 fd000009000000000000000000000001 eth0',
      ],
      neighbours: ['10.9.0.1 02:00:00:00:00:01 eth0'],
    });
  });

  test('has a guest that takes all of it over, also when it is told again', async () => {
    await using network = attach();
    const config = (await network.connect())!;
    using guest = NetworkNamespace.create();
    // Stands for the card: the same kind of interface, with the card's MAC.
    const card = guest.run(() => openTap('card'));
    try {
      ip(guest, 'link', 'set', 'lo', 'up');
      ip(guest, 'link', 'set', 'card', 'address', cards[0]!.mac);
      const its = new GuestNetwork();
      for (const _time of ['first', 'second']) guest.run(() => its.apply(asMessage(config)));
      const link = ip(guest, 'address', 'show', 'eth0');
      expect(link).toContain('02:00:00:00:00:42');
      expect(link).toContain('mtu 1400');
      expect(link).toContain('inet 10.9.0.2/24 brd 10.9.0.255 scope global eth0');
      expect(link).toContain('inet6 fd00:9::2/64 scope global nodad');
      const routes = ip(guest, 'route');
      expect(routes).toContain('default via 10.9.0.1 dev eth0');
      expect(routes).toContain('10.1.0.0/16 via 10.9.0.7 dev eth0 metric 5');
      expect(routes).toContain('169.254.1.1 dev eth0 scope link');
      expect(ip(guest, '-6', 'route')).toContain('default via fd00:9::1 dev eth0');
      expect(ip(guest, 'neighbour')).toContain('10.9.0.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT');
    } finally {
      closeSync(card);
    }
  });

  test('has a guest that loses what is taken away, and keeps what its containers have made', async () => {
    await using network = attach();
    using guest = NetworkNamespace.create();
    const card = guest.run(() => openTap('card'));
    try {
      ip(guest, 'link', 'set', 'card', 'address', cards[0]!.mac);
      const its = new GuestNetwork();
      const take = async () => {
        const config = asMessage((await network.connect())!);
        guest.run(() => its.apply(config));
      };
      ip(sandbox, 'address', 'add', '10.9.0.3/24', 'dev', 'eth0');
      await take();
      ip(guest, 'address', 'add', '10.9.7.7/32', 'dev', 'eth0');
      ip(guest, 'route', 'add', '10.7.0.0/16', 'via', '10.9.0.9');

      // The first of the subnet: the kernel takes the others away with it, and their routes.
      ip(sandbox, 'address', 'del', '10.9.0.2/24', 'dev', 'eth0');
      ip(sandbox, 'address', 'replace', '10.9.0.3/24', 'dev', 'eth0');
      ip(sandbox, 'link', 'set', 'eth0', 'down');
      ip(sandbox, 'link', 'set', 'eth0', 'name', 'net0', 'mtu', '1300', 'up');
      ip(sandbox, 'route', 'add', 'default', 'via', '10.9.0.8');
      await take();
      const link = ip(guest, 'address', 'show', 'net0');
      expect(link).not.toContain('10.9.0.2');
      expect(link).toContain('10.9.0.3/24');
      expect(link).toContain('10.9.7.7/32');
      expect(link).toContain('mtu 1300');
      expect(ip(guest, 'route')).toMatch(/^default via 10\.9\.0\.8 dev net0 $/m);
      expect(ip(guest, 'route')).not.toContain('10.1.0.0/16');
      expect(ip(guest, 'neighbour')).not.toContain('PERMANENT');
      expect(ip(sandbox, 'link', 'show', 'kiln-tap0')).toContain('mtu 1300');
    } finally {
      closeSync(card);
    }
  });

  test('is watched: what comes, changes and goes is told, and a card that is free is used again', async () => {
    await using network = attach();
    const told: string[] = [];
    const look = async () => {
      const config = await network.connect();
      if (config === undefined) return;
      network.told(config);
      told.push(config.interfaces.map(({ name, cardMac }) => `${name} ${cardMac.at(-1)}`).join());
    };
    await look();
    using _watch = network.watch(() => void look());
    veth('eth1', 'h1', '02:00:00:00:00:43');
    await vi.waitFor(() => expect(told.at(-1)).toBe('eth0 0,eth1 1'));
    ip(sandbox, 'link', 'set', 'eth1', 'down');
    ip(sandbox, 'link', 'set', 'eth1', 'name', 'other1');
    await vi.waitFor(() => expect(told.at(-1)).toBe('eth0 0,other1 1'));
    ip(host, 'link', 'del', 'h0');
    await vi.waitFor(() => expect(told.at(-1)).toBe('other1 1'));
    veth('eth2', 'h2', '02:00:00:00:00:44');
    await vi.waitFor(() => expect(told.at(-1)).toBe('eth2 0,other1 1'));
    for (const peer of ['h1', 'h2']) ip(host, 'link', 'del', peer);
    await vi.waitFor(() => expect(told.at(-1)).toBe(''));
    const count = told.length;
    await look();
    expect(told).toHaveLength(count);
  });

  test('has what is sent to it at the tap, and not in its namespace', async () => {
    await using network = attach();
    await network.connect();
    ip(host, 'address', 'add', '10.9.0.1/24', 'dev', 'h0');
    ip(host, 'neighbour', 'add', '10.9.0.2', 'lladdr', '02:00:00:00:00:42', 'dev', 'h0');
    host.run(() => spawnSync('bash', ['-c', 'echo here >/dev/udp/10.9.0.2/9']));
    await vi.waitFor(() => {
      const bytes = Buffer.alloc(2048);
      const frame = bytes.subarray(0, readSync(taps[0]!, bytes));
      // A struct virtio_net_hdr of 10 bytes and Ethernet's header of 14 come before IP's, which has its protocol at 9: UDP.
      expect([frame.readUInt16BE(22), frame[33]]).toEqual([0x0800, 17]);
      expect(frame.toString('latin1')).toContain('here');
    });
    // The namespace still has the address, but would answer only if it saw anything.
    expect(knock()).not.toContain('refused');
  });

  test('has answers of name servers come to programs of the host in its namespace, too, and nothing else', async () => {
    const network = attach();
    network.admitAnswers();
    await network.connect();
    ip(sandbox, 'neighbour', 'del', '10.9.0.1', 'dev', 'eth0');
    ip(host, 'address', 'add', '10.9.0.1/24', 'dev', 'h0');
    await using _server = await nodeIn(
      host,
      `const reply = (data) => 'answer to ' + data;
       const socket = require('node:dgram').createSocket('udp4');
       socket.on('message', (data, peer) => socket.send(reply(data), peer.port, peer.address));
       require('node:net').createServer((each) => each.once('data', (data) => each.end(reply(data)))).listen(53, '10.9.0.1', () => {
         socket.bind(53, '10.9.0.1', () => console.log('ready'));
       });`,
    );
    const ask = async () => {
      await using byUdp = await nodeIn(
        sandbox,
        `const socket = require('node:dgram').createSocket('udp4');
         socket.on('message', (data) => { console.log(String(data)); socket.close(); });
         socket.connect(53, '10.9.0.1', () => socket.send('udp'));`,
      );
      await using byTcp = await nodeIn(
        sandbox,
        `require('node:net').connect(53, '10.9.0.1').on('data', (data) => console.log(String(data))).write('tcp');`,
      );
      return [byUdp.said, byTcp.said];
    };
    const answers = ['answer to udp', 'answer to tcp'];
    expect(await ask()).toEqual(answers);
    // The guest may have asked.
    await vi.waitFor(() => {
      const bytes = Buffer.alloc(2048);
      expect(bytes.subarray(0, readSync(taps[0]!, bytes)).toString('latin1')).toContain('answer to udp');
    });
    expect(knock()).not.toContain('refused');

    await using later = networks.adopt('c', vm(), pathOf(sandbox));
    later.admitAnswers();
    expect(await ask()).toEqual(answers);
  });

  test('has nothing new for the guest once that has taken it over, until another interface comes', async () => {
    await using network = attach();
    const config = (await network.connect())!;
    expect(await network.connect()).toEqual(config);
    network.told(config);
    expect(await network.connect()).toBeUndefined();
    veth('eth1', 'h1', '02:00:00:00:00:43');
    expect((await network.connect())!.interfaces.map(({ name, cardMac }) => `${name} ${cardMac}`)).toEqual([
      `eth0 ${cards[0]!.mac}`,
      `eth1 ${cards[1]!.mac}`,
    ]);
  });

  test('is refused more interfaces than its VM has cards, and what to do is said', async () => {
    await using network = attach();
    veth('eth1', 'h1', '02:00:00:00:00:43');
    veth('eth2', 'h2', '02:00:00:00:00:44');
    await expect(network.connect()).rejects.toThrow(
      /container c: its VM has network cards for 2 interfaces, but there are 3: (eth[012](, )?){3}/,
    );
  });

  test('is refused an address that another machine on its network has', async () => {
    ip(host, 'address', 'add', 'fd00:9::3/64', 'nodad', 'dev', 'h0');
    ip(sandbox, 'address', 'add', 'fd00:9::3/64', 'dev', 'eth0');
    await vi.waitFor(() => expect(ip(sandbox, 'address')).toContain('dadfailed'), { timeout: 20_000 });
    await using network = attach();
    await expect(network.connect()).rejects.toThrow(
      'container c: the address fd00:9:0:0:0:0:0:3 of eth0 is in use by another machine on its network',
    );
  });

  test('tells once which card’s tap it has taken from where taps wait', async () => {
    const moved: number[] = [];
    await using network = networks.attach('c', vm(moved), pathOf(sandbox));
    await network.connect();
    expect(moved).toEqual([0]);
    veth('eth1', 'h1', '02:00:00:00:00:43');
    await network.connect();
    expect(moved).toEqual([0, 1]);
  });

  test('lets others go on while its tap moves, and those who ask meanwhile wait for it', async () => {
    const moved: number[] = [];
    await using network = networks.attach('c', vm(moved), pathOf(sandbox));
    const order: string[] = [];
    const asked = ['first', 'second'].map(async (name) => {
      const config = await network.connect();
      order.push(name);
      return config;
    });
    setImmediate(() => order.push('another'));
    const [first, second] = await Promise.all(asked);
    expect(order).toEqual(['another', 'first', 'second']);
    expect(second).toEqual(first);
    expect(moved).toEqual([0]);
  });

  test('leaves nothing when it ends while its tap moves', async () => {
    const open = () => readdirSync('/proc/self/fd').length;
    const before = open();
    const network = attach();
    const connected = network.connect();
    connected.catch(() => {});
    await network[Symbol.asyncDispose]();
    await expect(connected).rejects.toThrow('container c: its network has ended');
    await expect(network.connect()).rejects.toThrow('container c: its network has ended');
    expect(ip(sandbox, '-o', 'link')).not.toContain('kiln-tap');
    expect(open()).toBe(before);
  });

  test('is found again by a later kilnd', async () => {
    const config = (await attach().connect())!;
    await using network = networks.adopt('c', vm(), pathOf(sandbox));
    expect(await network.connect()).toEqual(config);
  });

  test('takes the tap away that a VM has left, which ended while no kilnd was there', async () => {
    closeSync(sandbox.run(() => openTap('kiln-tap0', { persistent: true })));
    await using network = attach();
    expect((await network.connect())!.interfaces).toHaveLength(1);
  });

  test('keeps no descriptor when a namespace cannot be taken over', () => {
    const open = () => readdirSync('/proc/self/fd').length;
    const before = open();
    expect(() => networks.adopt('c', vm(), '/dev/null')).toThrow();
    expect(open()).toBe(before);
  });

  test('belongs to one VM at a time', async () => {
    const first = attach();
    await first.connect();
    await expect(attach('d').connect()).rejects.toThrow(
      /container d: another container's VM is connected to its network namespace/,
    );
    await first[Symbol.asyncDispose]();
    expect(ip(sandbox, '-o', 'link')).not.toContain('kiln-tap');
    // The other one has never left.
    const again = parking.run(() => openTap('kt0'));
    await using second = attach();
    expect((await second.connect())!.interfaces).toHaveLength(1);
    closeSync(again);
  });

  test('stays connected when a VM ends that was refused', async () => {
    await using first = attach();
    await first.connect();
    const refused = attach('d');
    await expect(refused.connect()).rejects.toThrow();
    await refused[Symbol.asyncDispose]();
    expect(ip(sandbox, '-o', 'link')).toContain('kiln-tap0');
  });

  test('works again after a VM that ended without a kilnd to clean up', async () => {
    await attach().connect();
    for (const tap of taps.splice(0)) closeSync(tap);
    taps = parking.run(() => cards.map(({ tap }) => openTap(tap)));
    await using network = attach();
    expect((await network.connect())!.interfaces).toHaveLength(1);
  });

  test('leaves the interface as it was', async () => {
    const network = attach();
    await network.connect();
    await network[Symbol.asyncDispose]();
    ip(host, 'address', 'add', '10.9.0.1/24', 'dev', 'h0');
    ip(sandbox, 'neighbour', 'del', '10.9.0.1', 'dev', 'eth0');
    expect(knock()).toContain('refused');
  });
});

test('a sandbox’s macvlan has what is sent to it at the tap', async () => {
  ip(host, 'link', 'add', 'h0', 'type', 'veth', 'peer', 'name', 'h1');
  for (const name of ['h0', 'h1']) ip(host, 'link', 'set', name, 'up');
  ip(host, 'link', 'add', 'eth0', 'link', 'h1', 'netns', pathOf(sandbox), 'type', 'macvlan', 'mode', 'bridge');
  ip(sandbox, 'link', 'set', 'eth0', 'address', '02:00:00:00:00:42', 'up');
  await using network = attach();
  expect((await network.connect())!.interfaces.map(({ name, mac }) => `${name} ${mac}`)).toEqual([
    'eth0 02:00:00:00:00:42',
  ]);
  ip(host, 'address', 'add', '10.9.0.1/24', 'dev', 'h0');
  ip(host, 'neighbour', 'add', '10.9.0.2', 'lladdr', '02:00:00:00:00:42', 'dev', 'h0');
  host.run(() => spawnSync('bash', ['-c', 'echo here >/dev/udp/10.9.0.2/9']));
  await vi.waitFor(() => {
    const bytes = Buffer.alloc(2048);
    expect(bytes.subarray(0, readSync(taps[0]!, bytes)).toString('latin1')).toContain('here');
  });
});

describe('a sandbox without interfaces', () => {
  test('has nothing for its guest, and no tap of its VM', async () => {
    await using network = attach();
    expect(await network.connect()).toBeUndefined();
    expect(ip(sandbox, '-o', 'link')).not.toContain('kiln-tap');
  });

  test('is not connected to the host’s own namespace, whose interfaces would be its guest’s', () => {
    expect(() => attach('c', `/proc/${process.pid}/ns/net`)).toThrow(
      "container c: its network namespace is the host's own, which a virtual machine cannot share",
    );
    expect(ip(parking, '-o', 'link')).toContain('kt0');
  });

  test('whose namespace is gone says so', () => {
    expect(() => attach('c', '/proc/self/fd/9999')).toThrow(
      'container c: its network namespace /proc/self/fd/9999 is gone',
    );
  });
});
