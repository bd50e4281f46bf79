import { mkdirSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { HelperProcess } from '../../../src/host/helper-process.ts';
import { killProcessesOf } from '../../../src/host/stale.ts';
import { startStandIn } from '../../../src/host/stand-in.ts';
import { compile, hasGcc, isAlive, isRoot, temporaryFolder } from '../native/harness.ts';

describe.skipIf(!hasGcc || !isRoot)('a container’s stand-in (needs gcc and root)', () => {
  let folder: string;
  let program: string;
  let directory: string;
  let standIn: HelperProcess | undefined;

  beforeAll(() => {
    folder = temporaryFolder();
    program = path.join(folder, 'kiln-standin');
    compile(['standin.c', 'standin-confine.c'], program);
  });
  beforeEach(() => {
    directory = path.join(folder, 'c', 'one');
    mkdirSync(directory, { recursive: true });
  });
  afterEach(async () => {
    await standIn?.kill();
    standIn = undefined;
    rmSync(directory, { recursive: true, force: true });
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test('shows nothing of the sandbox’s directory, adds nothing to it, and lets nobody write', async () => {
    writeFileSync(path.join(directory, 'qmp.sock'), '');
    standIn = await startStandIn({ program, id: 'web', directory });
    const root = `/proc/${standIn.pid}/root`;
    expect(readdirSync(root)).toEqual([]);
    expect(() => writeFileSync(`${root}/file`, '')).toThrow(/EROFS/);
    expect(readdirSync(directory).sort()).toEqual(['qmp.sock', 'standin.log']);
    // The directory can be removed under it: no mount of the host's holds it.
    rmSync(directory, { recursive: true });
    expect(isAlive(standIn.pid)).toBe(true);
  });

  test('has a network of its own, shows the container’s id in ps, and dies when it is killed', async () => {
    standIn = await startStandIn({ program, id: 'web', directory });
    expect(readlinkSync(`/proc/${standIn.pid}/ns/net`)).not.toBe(readlinkSync('/proc/self/ns/net'));
    expect(readFileSync(`/proc/${standIn.pid}/cmdline`, 'utf8')).toBe(`${program}\0-\0${directory}\0web\0`);
    await standIn.kill();
    expect(isAlive(standIn.pid)).toBe(false);
  });

  test('is found by a later kilnd, although it has dropped everything', async () => {
    standIn = await startStandIn({ program, id: 'web', directory });
    expect(await killProcessesOf(path.join(folder, 'c'))).toEqual([standIn.pid]);
  });

  test('that cannot start is an error with its own words, and no process', async () => {
    const complaining = path.join(folder, 'complaining');
    writeFileSync(complaining, '#!/bin/sh\nprintf "error: no more namespaces" >&3\nexec sleep 1000 3>&-\n', {
      mode: 0o755,
    });
    await expect(startStandIn({ program: complaining, id: 'web', directory })).rejects.toMatchObject({
      code: 'internal',
      message: "cannot start the container's stand-in process: no more namespaces",
    });
    expect(await killProcessesOf(path.join(folder, 'c'))).toEqual([]);
  });

  test('that ends without a word, or is not there, is an error too', async () => {
    await expect(startStandIn({ program: 'true', id: 'web', directory })).rejects.toThrow(/stand-in process: it ended/);
    await expect(startStandIn({ program: '/no/stand-in', id: 'web', directory })).rejects.toThrow(
      'cannot run the stand-in "/no/stand-in": ENOENT',
    );
  });
});
