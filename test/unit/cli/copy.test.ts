/** `kiln cp` from the command to the agent's code; a folder stands for the container, and nothing for its guest. */
import { EventEmitter } from 'node:events';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { AgentError } from '../../../agent/errors.ts';
import { filesError, sendFiles, takeFiles } from '../../../agent/files.ts';
import { copyCommand } from '../../../src/cli/copy.ts';
import { copyFiles } from '../../../src/daemon/copy.ts';
import { KilnError } from '../../../src/errors.ts';
import type { ContainerFiles } from '../../../src/sandbox/container-files.ts';
import { ControlServer } from '../../../src/shim/control/server.ts';
import type { Endpoint } from '../../../src/shim/endpoint.ts';

let dir: string;
let server: ControlServer;
let files: ContainerFiles | undefined;

const inside = (...parts: string[]) => join(dir, 'container', ...parts);
const outside = (...parts: string[]) => join(dir, 'host', ...parts);

/** As `Guest` passes the agent's errors on. */
function passedOn(error: unknown, path: string): unknown {
  const known = filesError(error, path);
  return known instanceof AgentError ? new KilnError(known.code, known.message) : known;
}

class Collected extends EventEmitter {
  readonly cancelled = false;
  readonly pieces: Buffer[] = [];
  write({ data }: { data: Buffer }): boolean {
    this.pieces.push(data);
    return true;
  }
  end(): void {}
}

const overFolder = (): ContainerFiles => ({
  async *read(path) {
    const call = new Collected();
    try {
      await sendFiles({ id: '', path: Buffer.from(path) }, inside(), call as never);
    } catch (error) {
      throw passedOn(error, path);
    }
    yield* call.pieces;
  },
  async write(directory, stream) {
    const message = (data: Buffer) => ({ id: '', path: Buffer.from(directory), keepOwners: true, data });
    const rest = async function* () {
      for await (const data of stream) yield message(data);
    };
    try {
      await takeFiles(message(Buffer.alloc(0)), inside(), rest());
    } catch (error) {
      throw passedOn(error, directory);
    }
  },
});

beforeEach(async () => {
  dir = mkdtempSync(join(tmpdir(), 'kt-cp-'));
  for (const name of ['container/d/sub', 'host', 'state']) mkdirSync(join(dir, name), { recursive: true });
  writeFileSync(inside('d/one'), 'one');
  writeFileSync(inside('d/sub/two'), 'two', { mode: 0o4755 });
  symlinkSync('/d', inside('link'));
  vi.stubEnv('KILN_STATE_DIR', join(dir, 'state'));
  files = overFolder();
  const endpoints = ['c1', 'c2', 'd3'].map((id) => ({ id, namespace: 'default', container: { files } }));
  server = await ControlServer.listen(join(dir, 'state'), async (request) => {
    if (request.kind !== 'copy') throw new KilnError('unimplemented', request.kind);
    return copyFiles(endpoints as unknown as Endpoint[], request);
  });
});

afterEach(async () => {
  vi.unstubAllEnvs();
  await server.close();
  rmSync(dir, { recursive: true, force: true });
});

const copy = (...args: string[]) => copyCommand().exitOverride().parseAsync(args, { from: 'user' });

describe('kiln cp from a container', () => {
  test('takes a file, by the name that it has or is given, and by links on the way', async () => {
    await copy('c1:/d/one', outside());
    await copy('c1:d/one', outside('renamed'));
    await copy('d:/link/sub/two', outside());
    expect(['one', 'renamed', 'two'].map((name) => readFileSync(outside(name), 'utf8'))).toEqual(['one', 'one', 'two']);
    // A guest's program does not become the caller's.
    expect(lstatSync(outside('two')).mode & 0o7777).toBe(0o755);
  });

  test('takes a directory into one that exists, as one that does not, or what is in it', async () => {
    await copy('c1:/d', outside());
    await copy('c1:/d', outside('new'));
    mkdirSync(outside('into'));
    await copy('c1:/link/.', outside('into'));
    for (const name of ['d', 'new', 'into']) expect(readdirSync(outside(name)).sort()).toEqual(['one', 'sub']);
    await copy('c1:/link', outside());
    expect(readlinkSync(outside('link'))).toBe('/d');
  });

  test.each([
    ['a file that is not there', ['c1:/nothing', '.'], /^\/nothing: no such file or directory$/],
    ['what is in a file', ['c1:/d/one/.', '.'], /^\/d\/one\/\.: not a directory$/],
    ['a path that goes up', ['c1:/d/../d', '.'], /has "\.\." in it/],
    ['a container that is not there', ['nobody:/d', '.'], /no container nobody in the namespace default/],
    ['two containers that begin so', ['c:/d', '.'], /2 containers in the namespace default begin with c/],
    ['two containers at once', ['c1:/d', 'c2:/d'], /one of source and target must be ID:PATH/],
    ['no container', ['a', 'b'], /one of source and target must be ID:PATH/],
  ])('refuses %s', async (_, [source = '', target = ''], words) => {
    await expect(copy(source, target === '.' ? outside() : target)).rejects.toThrow(words);
    expect(readdirSync(outside())).toEqual([]);
  });

  test('refuses a file in a directory’s place, and the other way', async () => {
    mkdirSync(outside('one'));
    await expect(copy('c1:/d/one', outside())).rejects.toThrow('cannot put another file in the place of "one"');
    writeFileSync(outside('d'), 'file');
    await expect(copy('c1:/d', outside())).rejects.toThrow('cannot put a directory in the place of "d"');
    expect(readFileSync(outside('d'), 'utf8')).toBe('file');
  });

  test('takes nothing that was not asked for, whatever the guest sends', async () => {
    const other = files?.read('/d/sub');
    if (files !== undefined) files.read = () => other as AsyncGenerator<Buffer>;
    await expect(copy('c1:/d/one', outside())).rejects.toThrow('the guest sends "sub", which was not asked for');
    expect(readdirSync(outside())).toEqual([]);
  });
});

describe('kiln cp to a container', () => {
  test('brings a file or a directory into one that exists, or as one that does not', async () => {
    mkdirSync(outside('tree'));
    writeFileSync(outside('tree/leaf'), 'leaf');
    await copy(outside('tree/leaf'), 'c1:/link');
    await copy(outside('tree/leaf'), 'c1:/d/other');
    await copy(outside('tree'), 'c1:/d');
    await copy(outside('tree'), 'c1:/new');
    await copy(`${outside('tree')}/.`, 'c1:/d/sub');
    for (const name of ['d/leaf', 'd/other', 'd/tree/leaf', 'new/leaf', 'd/sub/leaf']) {
      expect(readFileSync(inside(name), 'utf8')).toBe('leaf');
    }
  });

  test('refuses a directory that is not there, with nothing made', async () => {
    writeFileSync(outside('file'), 'x');
    await expect(copy(outside('file'), 'c1:/nowhere/file')).rejects.toThrow(/^\/nowhere: no such file or directory$/);
    await expect(copy(outside('file'), 'c1:/nowhere/')).rejects.toThrow(
      'there is no directory /nowhere/ in container c1',
    );
    await expect(copy(outside('nothing'), 'c1:/d')).rejects.toThrow(/no such file/);
    expect(existsSync(inside('nowhere'))).toBe(false);
  });

  test('of one that has ended is refused, and says where its files are', async () => {
    const ended = [{ id: 'c1', namespace: 'default', container: {} }] as unknown as Endpoint[];
    const request = { kind: 'copy', namespace: 'default', id: 'c1', path: '/', socket: '', keepOwners: false } as const;
    const refused = copyFiles(ended, { ...request, direction: 'probe' });
    await expect(refused).rejects.toMatchObject({
      code: 'failed-precondition',
      hint: expect.stringContaining('nerdctl cp'),
    });
  });
});
