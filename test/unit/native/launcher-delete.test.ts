import { mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { compile, hasGcc, Installation, launcherSources, type Outcome, temporaryFolder } from './harness.ts';

describe.skipIf(!hasGcc)('a delete without a kilnd (needs gcc)', () => {
  let compiledFolder: string;
  let compiled: string;
  let kiln: Installation;

  beforeAll(() => {
    compiledFolder = temporaryFolder();
    compiled = path.join(compiledFolder, 'launcher');
    compile(launcherSources, compiled);
  });
  afterAll(() => rmSync(compiledFolder, { recursive: true, force: true }));
  beforeEach(() => {
    kiln = new Installation(compiled);
    kiln.installFakeKilnd('ready');
  });
  afterEach(() => kiln[Symbol.dispose]());

  const remove = (): Promise<Outcome> => kiln.launch(['-namespace', 'n', '-id', 'i', '-bundle', '/gone', 'delete']);

  function expectAnsweredByItself({ code, stdout, stderr }: Outcome): void {
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const answer = DeleteResponse.decode(stdout);
    expect(answer).toMatchObject({ pid: 0, exitStatus: 137 });
    expect(Math.abs(Number(answer.exitedAt?.seconds) - Date.now() / 1000)).toBeLessThan(10);
    // Nothing is left over, and nothing is missing.
    expect(Buffer.from(DeleteResponse.encode(answer).finish()).equals(stdout)).toBe(true);
    expect(kiln.kilnds()).toEqual([]);
  }

  test('is answered by the launcher where there is no state folder, as after a reboot', async () => {
    expectAnsweredByItself(await remove());
  });

  test('is answered by the launcher where the last kilnd has left nothing of a container', async () => {
    mkdirSync(kiln.stateDir, { mode: 0o711 });
    for (const name of ['s', 'c', 't']) mkdirSync(path.join(kiln.stateDir, name));
    writeFileSync(path.join(kiln.stateDir, 'kilnd.log'), 'words of the day before\n');
    expectAnsweredByItself(await remove());
  });

  test.each(['s', 'c', 't'])('starts a kilnd where there is something in %s', async (name) => {
    mkdirSync(path.join(kiln.stateDir, name), { recursive: true, mode: 0o711 });
    writeFileSync(path.join(kiln.stateDir, name, '0123456789abcdef'), '');
    const { code, text } = await remove();
    expect(text).toMatch(/^kilnd \d+ delete$/);
    expect(code).toBe(0);
    expect(kiln.kilnds()).toHaveLength(1);
  });

  test('starts a kilnd where it cannot be told what is there', async () => {
    mkdirSync(kiln.stateDir, { mode: 0o711 });
    symlinkSync('t', path.join(kiln.stateDir, 't'));
    expect((await remove()).text).toMatch(/^kilnd \d+ delete$/);
  });

  test('is still refused with a state folder that cannot be', async () => {
    const stateDir = `/tmp/${'x'.repeat(92)}`;
    const args = ['-namespace', 'n', '-id', 'i', 'delete'];
    const { code, text } = await kiln.launch(args, { env: { KILN_STATE_DIR: stateDir } });
    expect(text).toMatch(/choose a shorter KILN_STATE_DIR/);
    expect(code).toBe(1);
  });
});
