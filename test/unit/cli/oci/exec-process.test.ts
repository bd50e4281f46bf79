import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it, onTestFinished } from 'vitest';
import { execProcess, readProcess } from '../../../../src/cli/oci/exec-process.ts';
import { errorOf } from '../../oci/specs.ts';

const base = {
  args: ['sleep', '100'],
  cwd: '/srv',
  env: ['PATH=/bin'],
  terminal: true,
  user: { uid: 1, gid: 2, additionalGids: [3] },
  capabilities: { bounding: ['CAP_KILL'], effective: ['CAP_KILL'], permitted: ['CAP_KILL'] },
};

describe('the process of `kiln exec`', () => {
  it('is the container’s with another command line, and without a terminal unless asked for', () => {
    expect(execProcess(base, ['ls', '-l'], {})).toEqual({ ...base, args: ['ls', '-l'], terminal: false });
    expect(execProcess(base, ['ls'], { tty: true }).terminal).toBe(true);
  });

  it('has more variables, and another folder', () => {
    const process = execProcess(base, ['ls'], { env: ['A=1', 'B=2'], cwd: '/tmp' });
    expect(process).toMatchObject({ env: ['PATH=/bin', 'A=1', 'B=2'], cwd: '/tmp' });
  });

  it('has another user, whose groups are those of the spec and those that are added', () => {
    expect(execProcess(base, ['id'], { user: '5:6' }).user).toEqual({ uid: 5, gid: 6, additionalGids: [3] });
    expect(execProcess(base, ['id'], { user: '5' }).user).toEqual({ uid: 5, gid: 2, additionalGids: [3] });
    expect(execProcess(base, ['id'], { additionalGids: ['7', '8'] }).user).toEqual({
      uid: 1,
      gid: 2,
      additionalGids: [3, 7, 8],
    });
  });

  it('has more capabilities, ambient ones only where some can be inherited', () => {
    const more = ['CAP_KILL', 'CAP_NET_RAW'];
    const sets = { bounding: more, effective: more, permitted: more };
    expect(execProcess(base, ['id'], { cap: ['CAP_NET_RAW'] }).capabilities).toEqual(sets);
    const inheriting = { ...base, capabilities: { ...base.capabilities, inheritable: ['CAP_KILL'] } };
    expect(execProcess(inheriting, ['id'], { cap: ['CAP_NET_RAW'] }).capabilities).toEqual({
      ...sets,
      inheritable: ['CAP_KILL'],
      ambient: ['CAP_NET_RAW'],
    });
    expect(execProcess({ args: ['x'], cwd: '/' }, ['id'], { cap: ['CAP_KILL'] }).capabilities).toEqual({
      bounding: ['CAP_KILL'],
      effective: ['CAP_KILL'],
      permitted: ['CAP_KILL'],
    });
  });

  it('has its labels, and gains no privileges', () => {
    const options = { apparmor: 'p', processLabel: 'l', noNewPrivs: true };
    expect(execProcess(base, ['id'], options)).toMatchObject({
      ...{ apparmorProfile: 'p', selinuxLabel: 'l', noNewPrivileges: true },
    });
  });

  it.each([
    [[], {}, 'exec args cannot be empty'],
    [['id'], { user: 'root' }, '--user root: must be UID or UID:GID, as numbers'],
    [['id'], { additionalGids: ['-1'] }, 'additional-gids must be a positive number -1'],
  ])('is refused where it makes no sense: %j %j', (command, options, message) => {
    expect(errorOf(() => execProcess(base, command, options)).message).toBe(message);
  });

  it('comes whole from a file, and errors name the file', () => {
    const dir = mkdtempSync(join(tmpdir(), 'kiln-exec-'));
    onTestFinished(() => rmSync(dir, { recursive: true }));
    const file = join(dir, 'process.json');
    writeFileSync(file, JSON.stringify(base));
    expect(readProcess(file)).toEqual(base);
    writeFileSync(file, JSON.stringify({ ...base, args: 5 }));
    expect(errorOf(() => readProcess(file)).message).toBe(`${file}: args: expected array, received number`);
    expect(errorOf(() => readProcess(join(dir, 'none'))).message).toBe(
      `cannot read the process from ${join(dir, 'none')}: ENOENT`,
    );
  });
});
