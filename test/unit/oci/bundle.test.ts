import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { parseSpec, readBundle } from '../../../src/oci/bundle.ts';
import { parseJson, stringifyJson } from '../../../src/oci/json.ts';
import { ctrSpec, errorOf } from './specs.ts';

let bundle: string;

beforeEach(() => {
  bundle = mkdtempSync(join(tmpdir(), 'kiln-bundle-'));
});

afterEach(() => {
  rmSync(bundle, { recursive: true });
});

const writeConfig = (text: string): void => writeFileSync(join(bundle, 'config.json'), text);

describe('readBundle', () => {
  test('gives the spec and the absolute path of the root', async () => {
    writeConfig(JSON.stringify(ctrSpec()));
    expect(await readBundle(bundle)).toEqual({
      dir: bundle,
      configFile: join(bundle, 'config.json'),
      spec: ctrSpec(),
      rootPath: join(bundle, 'rootfs'),
    });
  });

  test('leaves an absolute root path as it is', async () => {
    writeConfig(JSON.stringify({ ...ctrSpec(), root: { path: '/srv/rootfs' } }));
    expect((await readBundle(bundle)).rootPath).toBe('/srv/rootfs');
  });

  test('carries along what it does not know, with every digit of large integers', async () => {
    const text =
      '{"ociVersion":"1.0.2","process":{"args":["a"],"cwd":"/","rlimits":[{"type":"RLIMIT_CORE",' +
      '"hard":18446744073709551615,"soft":1.5}]},"root":{"path":"r"},"futureField":{"x":[-9223372036854775808]}}';
    writeConfig(text);
    const { spec } = await readBundle(bundle);
    expect(spec).toMatchObject({ futureField: { x: [-9223372036854775808n] } });
    expect(stringifyJson(spec)).toBe(text);
  });

  test.each<[string, () => void, string]>([
    ['that is missing', () => {}, 'no such file'],
    ['that is a directory', () => mkdirSync(join(bundle, 'config.json')), 'not a regular file'],
    ['that is a FIFO', () => execFileSync('mkfifo', [join(bundle, 'config.json')]), 'not a regular file'],
    ['that is empty', () => writeConfig(''), 'not valid JSON'],
    ['that is cut off', () => writeConfig('{"ociVersion": "1.0'), 'not valid JSON'],
    ['that is nested too deeply', () => writeConfig('['.repeat(1_000_000)), 'not valid JSON'],
    [
      'of 16 MiB and a byte',
      () => {
        writeConfig('');
        truncateSync(join(bundle, 'config.json'), 16 * 1024 * 1024 + 1);
      },
      '16777217 bytes is over the limit of 16777216',
    ],
  ])('refuses a config.json %s', async (_name, prepare, reason) => {
    prepare();
    const error = await readBundle(bundle).then(
      () => undefined,
      (thrown: unknown) => thrown,
    );
    expect(error).toMatchObject({ code: 'invalid-argument' });
    expect(String(error)).toContain(`${bundle}/config.json: ${reason}`);
  });
});

describe('parseSpec', () => {
  const change = (path: string, value: unknown): string => {
    const spec: Record<string, unknown> = ctrSpec() as never;
    const keys = path.split('.');
    const last = keys.pop() ?? '';
    const parent = keys.reduce<Record<string, unknown>>((at, key) => at[key] as Record<string, unknown>, spec);
    parent[last] = value;
    return JSON.stringify(spec);
  };

  test.each<[string, unknown, string]>([
    ['ociVersion', undefined, 'ociVersion: is missing'],
    ['process', undefined, 'process: is missing'],
    ['process', [], 'process: expected object, received array'],
    ['process.args', undefined, 'process.args: is missing'],
    ['process.args', 'sh', 'process.args: expected array, received string'],
    ['process.args', [], 'process.args: expected at least one argument'],
    ['process.args', ['sh', 1], 'process.args[1]: expected string, received number'],
    ['process.cwd', 'tmp', 'process.cwd: expected an absolute path'],
    ['process.env', { A: 'b' }, 'process.env: expected array, received object'],
    ['process.user', { uid: 'root' }, 'process.user.uid: expected an integer'],
    ['process.terminal', 'yes', 'process.terminal: expected boolean, received string'],
    ['root', undefined, 'root: is missing'],
    ['root.path', '', 'root.path: expected a path'],
    ['mounts', [{ type: 'proc' }], 'mounts[0].destination: is missing'],
    ['mounts', [{ destination: '' }], 'mounts[0].destination: expected a path'],
    ['mounts', [{ destination: '/a', options: ['ro', null] }], 'mounts[0].options[1]: expected string, received null'],
    ['hooks', { prestart: [{}] }, 'hooks.prestart[0].path: is missing'],
    ['hooks', { poststop: [{ path: 'bin/x' }] }, 'hooks.poststop[0].path: expected an absolute path'],
    [
      'hooks',
      { poststart: [{ path: '/x', args: [1] }] },
      'hooks.poststart[0].args[0]: expected string, received number',
    ],
    ['hooks', { poststart: [{ path: '/x', env: ['A=', 'B'] }] }, 'hooks.poststart[0].env[1]: expected NAME=VALUE'],
    [
      'hooks',
      { startContainer: [{ path: '/x', timeout: 0 }] },
      'hooks.startContainer[0].timeout: expected more than 0 seconds',
    ],
    ['process.capabilities', { bounding: 'ALL' }, 'process.capabilities.bounding: expected array, received string'],
    ['process.rlimits', [{ soft: 1 }], 'process.rlimits[0].type: is missing'],
    ['process.ioPriority', { priority: 'high' }, 'process.ioPriority.priority: expected an integer'],
    ['linux.seccomp', { syscalls: [1] }, 'linux.seccomp.syscalls[0]: expected object, received number'],
    ['annotations', { 'io.kiln.vcpus': 2 }, 'annotations["io.kiln.vcpus"]: expected string, received number'],
    ['linux', 'no', 'linux: expected object, received string'],
    ['linux.namespaces', [{}], 'linux.namespaces[0].type: is missing'],
    ['linux.resources', { memory: { limit: '1G' } }, 'linux.resources.memory.limit: expected an integer'],
    ['linux.resources', { cpu: { quota: 0.5 } }, 'linux.resources.cpu.quota: expected an integer'],
    ['linux.devices', [{ path: '/dev/x' }], 'linux.devices[0].type: is missing'],
  ])('names the place of a wrong %s (%j)', (path, value, expected) => {
    const error = errorOf(() => parseSpec(change(path, value), 'config.json'));
    expect(error.code).toBe('invalid-argument');
    expect(error.message).toBe(`config.json: ${expected}`);
  });

  test('refuses a document that is no object', () => {
    expect(errorOf(() => parseSpec('[]', 'config.json')).message).toBe(
      'config.json: $: expected object, received array',
    );
    expect(errorOf(() => parseSpec('null', 'config.json')).message).toBe('config.json: $: is missing');
  });

  test('takes null for absent, as Go writes it', () => {
    const spec = parseSpec(change('mounts', null), 'config.json');
    expect(spec).not.toHaveProperty('mounts');
  });
});

describe('JSON', () => {
  test('round-trips integers beyond 2^53 and leaves other numbers alone', () => {
    const text = '{"a":18446744073709551615,"b":[1,-0.5,1e+300],"c":9007199254740993,"__proto__":{"d":1}}';
    expect(stringifyJson(parseJson(text))).toBe(text);
  });
});
