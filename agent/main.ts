/**
 * kiln-agent, the guest's side of Kiln: dials the host as soon as it is up and serves gRPC on that connection. That the
 * connection arrives tells the host that the guest is ready; when it breaks (the daemon was restarted, the virtual
 * machine was restored from a snapshot) the agent dials again, and the containers do not notice.
 *
 * It runs as the only child of the guest's PID 1. If it cannot go on it exits, PID 1 ends with it, and the kernel's
 * panic or reboot ends the virtual machine: the host sees that at once.
 *
 * Environment: KILN_AGENT_SOCKET, a Unix socket to dial instead of vsock (on a host, for tests: then the clock and the
 * hostname are left alone); KILN_AGENT_DIR, for bundles and crun's state, /run/kiln; KILN_CRUN, crun.
 */
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { AgentService } from '../gen/kiln/agent/v1/agent.ts';
import { serveOverSocket } from '../src/rpc/grpc/server-transport.ts';
import { becomeChildSubreaper } from '../src/sys/process.ts';
import { connectVsock, VMADDR_CID_HOST } from '../src/sys/vsock.ts';
import { Containers } from './containers.ts';
import { Crun } from './crun.ts';
import { describe } from './errors.ts';
import { Reaper } from './reaper.ts';
import { createService } from './service.ts';

/** Where the host listens for its guests, unless it says otherwise: `kiln.agent_port=N` on the kernel's command line. */
const HOST_PORT = 1024;

/**
 * Between connections on which no Hello came, in milliseconds: nothing tells a guest when a listener appears, so it has
 * to try. The first time it tries again at once.
 */
const FIRST_RETRY = 10;
const LAST_RETRY = 200;

async function dial(socketPath: string | undefined): Promise<Socket> {
  if (socketPath === undefined) {
    const port = /(?:^|\s)kiln\.agent_port=(\d+)/.exec(readFileSync('/proc/cmdline', 'utf8'))?.[1];
    return connectVsock(VMADDR_CID_HOST, port === undefined ? HOST_PORT : Number(port));
  }
  const socket = connect(socketPath);
  await once(socket, 'connect');
  return socket;
}

async function main(): Promise<never> {
  const {
    KILN_AGENT_SOCKET: socketPath,
    KILN_AGENT_DIR: directory = '/run/kiln',
    KILN_CRUN: command = 'crun',
  } = process.env;
  becomeChildSubreaper();
  const reaper = new Reaper();
  const crun = new Crun({ command, root: join(directory, 'crun'), reaper });
  const containers = new Containers({ directory: join(directory, 'containers'), crun, reaper });
  let retry = FIRST_RETRY;
  for (;;) {
    try {
      const socket = await dial(socketPath);
      const onHello = () => {
        retry = FIRST_RETRY;
      };
      const service = createService({ containers, ownsGuest: socketPath === undefined, onHello });
      await serveOverSocket(AgentService, service, socket).closed;
    } catch (error) {
      if (retry === FIRST_RETRY) log(`cannot reach the host, trying again: ${describe(error)}`);
    }
    if (retry > FIRST_RETRY) await new Promise((resolve) => setTimeout(resolve, retry));
    retry = Math.min(retry * 2, LAST_RETRY);
  }
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
