/**
 * kiln-agent, the guest's side of Kiln: dials the host as soon as it is up and serves gRPC on that connection. That the
 * connection arrives tells the host that the guest is ready; when it breaks (the daemon was restarted, the virtual
 * machine was restored from a snapshot) the agent dials again, and the containers do not notice.
 *
 * It runs as the only child of the guest's PID 1. If it cannot go on it exits, PID 1 ends with it, and the kernel's
 * panic or reboot ends the virtual machine: the host sees that at once.
 *
 * Environment: KILN_AGENT_SOCKET, a Unix socket to dial instead of vsock (on a host, for tests: then the clock and the
 * hostname are left alone); KILN_AGENT_DIR, for bundles and crun's state, /run/kiln; KILN_CRUN, crun; KILN_LISTENERS,
 * kiln-listeners; KILN_NAMESERVERS, kiln-nameservers; KILN_OOM_SCORE, kiln-oom-score.
 */
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { AgentService } from '../gen/kiln/agent/v1/agent.ts';
import { prepareServer, type ServedSocket } from '../src/rpc/grpc/server-transport.ts';
import { collectYoung } from '../src/sys/garbage.ts';
import { becomeChildSubreaper } from '../src/sys/process.ts';
import { connectVsock, fdOfVsock, listenVsock, VMADDR_CID_ANY, VMADDR_CID_HOST } from '../src/sys/vsock.ts';
import { hideCards } from './cards.ts';
import { Containers } from './containers.ts';
import { Crun } from './crun.ts';
import { describe } from './errors.ts';
import { holdWritesTo } from './held-writes.ts';
import { Listeners } from './listeners.ts';
import { Nameservers } from './nameservers.ts';
import { GuestNetwork } from './network.ts';
import { Pod } from './pod.ts';
import { Reaper } from './reaper.ts';
import { type Dialled, dialSerialPort } from './serial-port.ts';
import { createService } from './service.ts';
import { Volumes, volumesChannel } from './volumes.ts';

/** Where the host listens for its guests, unless it says otherwise: `kiln.agent_port=N` on the kernel's command line. */
const HOST_PORT = 1024;
const portWord = 'kiln.agent_port=';

/**
 * Where the agent listens for a knock of its host. A vsock whose other end is a Unix socket (vhost-device-vsock) does not
 * always tell the guest that the host's end is gone: then the agent would wait for ever for a host that waits for it. A
 * knock has no content. It makes the agent look whether its connection lives, and dial at once if it has none.
 */
const KNOCK_PORT = 1025;

/** How long a living host may take to give a sign of life, in milliseconds. */
const PROBE_LIMIT = 2000;

/**
 * Between connections on which no Hello came, in milliseconds: nothing tells a guest when a listener appears, so it has
 * to try. The first time it tries again at once.
 */
const FIRST_RETRY = 10;
const LAST_RETRY = 200;

/** How the host is reached, by its Unix socket in tests, or else by what it says on the kernel's command line. */
function dialer(socketPath: string | undefined): { dial: () => Promise<Dialled>; knocked: boolean } {
  if (socketPath !== undefined) return { dial: () => dialUnix(socketPath), knocked: false };
  const words = readFileSync('/proc/cmdline', 'utf8').trim().split(' ');
  if (words.includes('kiln.channel=virtio-serial')) return { dial: dialSerialPort, knocked: false };
  const port = words.find((word) => word.startsWith(portWord))?.slice(portWord.length);
  return {
    dial: async () => {
      const at = performance.now();
      const socket = connectVsock(VMADDR_CID_HOST, port === undefined ? HOST_PORT : Number(port));
      holdWritesTo(fdOfVsock(socket));
      return { socket, at };
    },
    knocked: true,
  };
}

async function dialUnix(socketPath: string): Promise<Dialled> {
  const at = performance.now();
  const socket = connect(socketPath);
  await once(socket, 'connect');
  return { socket, at };
}

async function main(): Promise<never> {
  const {
    KILN_AGENT_SOCKET: socketPath,
    KILN_AGENT_DIR: directory = '/run/kiln',
    KILN_CRUN: command = 'crun',
    KILN_LISTENERS: listenersProgram = '/usr/lib/kiln/kiln-listeners',
    KILN_NAMESERVERS: nameserversProgram = '/usr/lib/kiln/kiln-nameservers',
    KILN_OOM_SCORE: oomScoreProgram = '/usr/lib/kiln/kiln-oom-score',
  } = process.env;
  // Of this program alone (native/guest-joined-writes.c).
  delete process.env.LD_PRELOAD;
  becomeChildSubreaper();
  // Before the host may save the guest: its clones find it done.
  if (socketPath === undefined) hideCards();
  const reaper = new Reaper();
  const crun = new Crun({ command, root: join(directory, 'crun'), oomScoreProgram, reaper });
  const volumes = new Volumes({ directory: join(directory, 'volumes'), reaper, channel: volumesChannel });
  const pod = new Pod({ directory: join(directory, 'pod'), reaper });
  const containers = new Containers({ directory: join(directory, 'containers'), crun, reaper, volumes, pod });
  const ownsGuest = socketPath === undefined;
  const cgroup = ownsGuest ? '/sys/fs/cgroup' : undefined;
  const listeners = new Listeners({ program: listenersProgram, cgroup, reaper });
  const nameservers = new Nameservers({ program: nameserversProgram, cgroup: cgroup ?? '', reaper });
  const network = new GuestNetwork();
  let retry = FIRST_RETRY;
  let served: ServedSocket | undefined;
  let dialAtOnce = () => {};
  const { dial, knocked } = dialer(socketPath);
  if (knocked) {
    answerKnocks(() => {
      dialAtOnce();
      void hangUpIfDead(served);
    });
  }
  for (;;) {
    try {
      let connectedAt = 0;
      let isPrimed = false;
      const onHello = (becomesTemplate: boolean) => {
        retry = FIRST_RETRY;
        isPrimed = becomesTemplate;
      };
      const service = createService({
        containers,
        pod,
        listeners,
        nameservers,
        network,
        ownsGuest,
        connectedAt: () => connectedAt,
        onHello,
      });
      // Before it is needed: a clone of a template finds it made.
      const serve = prepareServer(AgentService, service);
      const { socket, at } = await dial();
      connectedAt = at;
      served = serve(socket);
      await served.closed;
      // So that a clone has room for what a start makes, and nothing to collect while it is at it.
      if (isPrimed) collectYoung();
    } catch (error) {
      if (retry === FIRST_RETRY) log(`cannot reach the host, trying again: ${describe(error)}`);
    }
    served = undefined;
    if (retry > FIRST_RETRY) {
      await new Promise<void>((resolve) => {
        dialAtOnce = resolve;
        setTimeout(resolve, retry);
      });
    }
    retry = Math.min(retry * 2, LAST_RETRY);
  }
}

function answerKnocks(onKnock: () => void): void {
  const { server } = listenVsock(VMADDR_CID_ANY, KNOCK_PORT);
  server.on('connection', (socket) => {
    socket.on('error', () => {});
    socket.destroy();
    onKnock();
  });
  // Without it, only a connection that dies unseen is not noticed.
  server.on('error', (error) => log(`cannot answer knocks: ${error.message}`));
}

async function hangUpIfDead(served: ServedSocket | undefined): Promise<void> {
  if (served === undefined || (await served.probe(PROBE_LIMIT))) return;
  log('the host gives no sign of life on this connection: dialling again');
  served.close();
}

/** The guest's console, which the host keeps. */
function log(message: string): void {
  process.stderr.write(`kiln-agent: ${message}\n`);
}

// An error that nobody expected may have left anything half done. Better no guest than one that lies.
process.on('uncaughtException', (error) => {
  log(`fatal: ${error.stack ?? error.message}`);
  process.exit(1);
});

void main();
