import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { controlCall } from '../../../src/shim/control/client.ts';
import { distBin } from '../../support/paths.ts';
import { kill, run } from '../native/harness.ts';
import { gone } from '../native/relay-bench.ts';
import { errorOf, TaskClient } from '../shim/task-client.ts';

// kilnd, launcher and relays as they are installed: `scripts/build` has made them. No container is made.

interface Status {
  readonly pid: number;
  readonly containers: readonly { id: string; relayPid: number | null; connections: number }[];
}

let directory: string;
let stateDir: string;
let clients: TaskClient[];
/** What was seen to run, to be ended whatever happens: the relays first, which would start another kilnd. */
let relays: Set<number>;
let kilnds: Set<number>;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-r-'));
  stateDir = join(directory, 'state');
  writeFileSync(join(directory, 'config.toml'), '');
  clients = [];
  relays = new Set();
  kilnds = new Set();
});
afterEach(async () => {
  for (const client of clients) client.ttrpc.close();
  for (const pid of [...relays, ...kilnds]) kill(pid);
  rmSync(directory, { recursive: true, force: true });
});

const environment = () => ({
  PATH: process.env.PATH,
  KILN_STATE_DIR: stateDir,
  KILN_CACHE_DIR: join(directory, 'cache'),
  KILN_CONFIG: join(directory, 'config.toml'),
});

function shim(id: string, ...args: string[]) {
  const bundle = join(directory, 'bundles', id);
  mkdirSync(bundle, { recursive: true });
  return run(join(distBin, 'containerd-shim-kiln-v2'), ['-namespace', 'n', '-id', id, ...args], {
    cwd: bundle,
    env: environment(),
  });
}

async function status(): Promise<Status> {
  const { stdout } = await controlCall(stateDir, { kind: 'status' });
  const found = JSON.parse(Buffer.from(stdout).toString()) as Status;
  kilnds.add(found.pid);
  for (const { relayPid } of found.containers) if (relayPid !== null) relays.add(relayPid);
  return found;
}

/** What containerd does first for a container. */
async function start(id: string): Promise<TaskClient> {
  const { text } = await shim(id, 'start');
  expect(text).toMatch(/^unix:\/\//);
  const socket = connect(text.replace('unix://', ''));
  await once(socket, 'connect');
  const client = new TaskClient(socket, id);
  clients.push(client);
  await client.connect();
  return client;
}

async function killKilnd(): Promise<void> {
  const { pid } = await status();
  process.kill(pid, 'SIGKILL');
  await gone(pid);
}

describe.skipIf(process.getuid?.() !== 0)('kilnd that is killed', () => {
  it('again and again loses no connection and no request of ten containers', async () => {
    const all = await Promise.all(Array.from({ length: 10 }, (_, n) => start(`c${n}`)));
    let stop = false;
    const answeredBy = all.map(async (client) => {
      const shims = new Set<number>();
      while (!stop) shims.add((await client.connect()).shimPid);
      return shims;
    });
    for (let life = 0; life < 3; life += 1) {
      await killKilnd();
      // Every client has an answer of the next one.
      await Promise.all(all.map((client) => client.connect()));
    }
    stop = true;
    for (const shims of await Promise.all(answeredBy)) expect(shims.size).toBeGreaterThan(1);
    expect((await status()).containers.map(({ connections }) => connections)).toEqual(all.map(() => 1));
    for (const [n, client] of all.entries()) {
      client.ttrpc.close();
      expect((await shim(`c${n}`, 'delete')).code).toBe(0);
    }
    expect((await status()).containers).toEqual([]);
    expect(readdirSync(join(stateDir, 's'))).toEqual([]);
  });

  it('while it made a container is followed by one that removes what was made, on the same connection', async () => {
    const client = await start('c1');
    const [key = ''] = readdirSync(join(stateDir, 's'));
    const before = await status();
    const left = join(stateDir, 'c', key);
    mkdirSync(left);
    await killKilnd();
    expect((await client.connect()).shimPid).not.toBe(before.pid);
    const after = await status();
    expect(after.containers).toEqual([{ ...before.containers[0], connections: 1 }]);
    expect(existsSync(left)).toBe(false);
    expect(existsSync(join(stateDir, 's', key))).toBe(true);
    client.ttrpc.close();
    expect((await shim('c1', 'delete')).code).toBe(0);
    await gone(before.containers[0]?.relayPid ?? 0);
  });

  it('cannot hold up a delete, and its relay ends', async () => {
    const client = await start('c1');
    const { containers } = await status();
    await killKilnd();
    const [deleted] = await Promise.all([shim('c1', 'delete'), client.ttrpc.closed]);
    expect(deleted.code).toBe(0);
    await gone(containers[0]?.relayPid ?? 0);
    expect((await status()).containers).toEqual([]);
    // And the same id can be used anew.
    const again = await start('c1');
    expect(await errorOf(again.state())).toBe('NotFound: container c1 does not exist');
  });

  it('told to stop takes its relays with it, and nobody starts another', async () => {
    await start('c1');
    const { pid, containers } = await status();
    process.kill(pid, 'SIGTERM');
    process.kill(pid, 'SIGTERM');
    await controlCall(stateDir, { kind: 'stop' }).catch(() => {});
    await controlCall(stateDir, { kind: 'stop' }).catch(() => {});
    await gone(pid);
    await gone(containers[0]?.relayPid ?? 0);
    expect(existsSync(join(stateDir, 'kilnd.sock'))).toBe(false);
    expect(existsSync(join(stateDir, 'relay.sock'))).toBe(false);
    expect(readdirSync(join(stateDir, 's'))).toEqual([]);
  });
});
