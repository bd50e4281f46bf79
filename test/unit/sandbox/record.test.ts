import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Positions } from '../../../src/sandbox/positions.ts';
import { type ContainerRecord, readContainerRecord, writeContainerRecord } from '../../../src/sandbox/record.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-record-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const record: ContainerRecord = {
  place: 'alone',
  ...{ version: 1, id: 'c1', terminal: true, session: 's', answerLimitMs: 60_000, vmm: 'qemu' },
  vm: { version: 1, usedSlots: ['ro0'], deep: { of: ['the', 'driver'] } },
  standIn: { pid: 7, startTime: '123', bootId: 'b' },
  hooks: {
    ...{ prestart: [], createRuntime: [], poststart: [], bundle: '/b', ociVersion: '1.2.1', annotations: { a: 'b' } },
    poststop: [{ name: 'hooks.poststop[0]', path: '/bin/true', args: ['true'], env: ['A=b'], timeoutMs: 1000 }],
  },
  disks: { lower: '/l', writable: null },
  oomKills: 0,
};

describe("a container's record", () => {
  it('is read as it was written, by root alone, and replaced as a whole', () => {
    expect(readContainerRecord(folder)).toBeUndefined();
    writeContainerRecord(folder, record);
    expect(readContainerRecord(folder)).toEqual(record);
    const ended = { ...record, exit: { status: 137, atMs: 1_700_000_000_123 }, oomKills: 2 };
    writeContainerRecord(folder, ended);
    expect(readContainerRecord(folder)).toEqual(ended);
    const [name = '', ...others] = readdirSync(folder);
    expect(others).toEqual([]);
    expect(statSync(join(folder, name)).mode & 0o777).toBe(0o600);
  });

  it.each([
    ['empty', () => ''],
    ['half of one', (text: string) => text.slice(0, text.length / 2)],
    ['of another version', (text: string) => text.replace('"version":1', '"version":2')],
    ['without the hooks', (text: string) => text.replace('"hooks"', '"hoops"')],
    ['of a stand-in that is no process', (text: string) => text.replace('"pid":7', '"pid":0')],
    ['with no exit', (text: string) => text.replace('"oomKills"', '"exit":{"status":-1,"atMs":0},"oomKills"')],
  ])('that is %s is refused, with its path', (_what, change) => {
    writeContainerRecord(folder, record);
    const [name = ''] = readdirSync(folder);
    const file = join(folder, name);
    writeFileSync(file, change(readFileSync(file, 'utf8')));
    expect(() => readContainerRecord(folder)).toThrow(
      expect.objectContaining({ code: 'invalid-argument', message: `${file} is not a record of a container` }),
    );
  });
});

describe('the positions of outputs', () => {
  it('begin at zero, and are there for the next who opens the file, to the byte', () => {
    const file = join(folder, 'positions');
    using first = new Positions(file);
    expect(first.read()).toEqual({ stdout: 0, stderr: 0 });
    first.write('stderr', 5);
    first.write('stdout', 2 ** 40 + 3);
    using second = new Positions(file);
    expect(second.read()).toEqual({ stdout: 2 ** 40 + 3, stderr: 5 });
    second.write('stderr', 6);
    expect(first.read()).toEqual({ stdout: 2 ** 40 + 3, stderr: 6 });
    expect(statSync(file).mode & 0o777).toBe(0o600);
  });

  it('are not written any more once they are closed, which may be twice', () => {
    const file = join(folder, 'positions');
    const positions = new Positions(file);
    positions.write('stdout', 1);
    positions[Symbol.dispose]();
    positions[Symbol.dispose]();
    positions.write('stdout', 2);
    using next = new Positions(file);
    expect(next.read()).toEqual({ stdout: 1, stderr: 0 });
  });
});
