import { describe, expect, test } from 'vitest';
import { prepareExec } from '../../../src/daemon/containers.ts';
import type { ContainerContext } from '../../../src/daemon/endpoints.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { parseProcess } from '../../../src/oci/bundle.ts';
import { terminalSize, toGuestProcess, toGuestSpec } from '../../../src/oci/guest-spec.ts';
import type { Process } from '../../../src/oci/spec.ts';
import type { ExecTaskRequest } from '../../../src/shim/task.ts';
import { ctrSpec, errorOf, withProcess } from './specs.ts';

const options = { id: 'c1', rootfsPath: '/run/kiln/c1/rootfs' };
const given = (): Process => ({ ...ctrSpec().process }) as Process;

describe('the process of an exec', () => {
  test('goes to the guest as it is', () => {
    const { process, warnings } = toGuestProcess(given(), options);
    expect(process).toEqual(ctrSpec().process);
    expect(warnings).toEqual([]);
  });

  test("follows the rules of a container's own", () => {
    const process = {
      ...given(),
      apparmorProfile: 'docker-default',
      selinuxLabel: 'a:b',
      consoleSize: { width: 1, height: 1 },
    };
    const translated = toGuestProcess(process as Process, options);
    expect(translated.process).toEqual({ ...ctrSpec().process, consoleSize: { width: 1, height: 1 } });
    expect(translated.warnings).toEqual([
      'process.apparmorProfile: "docker-default" is not applied: AppArmor is not active in the guest',
      'process.selinuxLabel: not applied: SELinux is not active in the guest',
    ]);
    const own = toGuestSpec(withProcess(process), options);
    expect(own.spec.process).toEqual(translated.process);
    expect(own.warnings).toEqual(translated.warnings);
    const error = errorOf(() => toGuestProcess({ ...given(), ioPriority: { class: 'x' } } as Process, options));
    expect(error).toMatchObject({
      code: 'unimplemented',
      message: expect.stringContaining('process.ioPriority: '),
    });
  });

  test('keeps its terminal and the size, which is told apart, too', () => {
    const process = { ...given(), terminal: true, consoleSize: { width: 132, height: 43 } } as Process;
    expect(toGuestProcess(process, options).process).toMatchObject({
      terminal: true,
      consoleSize: { width: 132, height: 43 },
    });
    expect(terminalSize(process)).toEqual({ width: 132, height: 43 });
    expect(terminalSize(given())).toBeUndefined();
    expect(toGuestSpec(withProcess({ terminal: true }), options).spec.process.terminal).toBe(true);
  });
});

describe('the text of a process', () => {
  const parse = (text: string) => parseProcess(text, 'exec e1');
  const refusal = (text: string) => {
    const { code, message } = errorOf(() => parse(text));
    return `${code}: ${message}`;
  };

  test('is a process, with what is unknown carried along', () => {
    expect(parse('{"args":["id"],"cwd":"/","later":1}')).toEqual({ args: ['id'], cwd: '/', later: 1 });
  });

  test.each([
    ['', 'exec e1: not valid JSON'],
    ['[]', 'exec e1: $: expected object, received array'],
    ['null', 'exec e1: $: is missing'],
    ['{"cwd":"/"}', 'exec e1: args: is missing'],
    ['{"args":[],"cwd":"/"}', 'exec e1: args: expected at least one argument'],
    ['{"args":["id"],"cwd":"tmp"}', 'exec e1: cwd: expected an absolute path'],
    ['{"args":["id"],"cwd":"/","terminal":1}', 'exec e1: terminal: expected boolean, received number'],
    ['{"args":["id"],"cwd":"/","consoleSize":{"width":80}}', 'exec e1: consoleSize.height: is missing'],
    [
      '{"args":["id"],"cwd":"/","consoleSize":{"width":65536,"height":1}}',
      'exec e1: consoleSize.width: expected 0 to 65535',
    ],
    [
      '{"args":["id"],"cwd":"/","consoleSize":{"width":1,"height":-1}}',
      'exec e1: consoleSize.height: expected 0 to 65535',
    ],
  ])('%s is refused with its place', (text, expected) => {
    expect(refusal(text)).toContain(`invalid-argument: ${expected}`);
  });
});

describe('an Exec request', () => {
  const warnings: string[] = [];
  const logger = loggerTo({ write: (line) => void warnings.push((JSON.parse(line) as { msg: string }).msg) }, 'warn');
  const context = { directory: '/run/kiln/c/c1', namespace: 'ns', logger } as unknown as ContainerContext;
  const typeUrl = 'types.containerd.io/opencontainers/runtime-spec/1/Process';
  const request = (fields: Partial<ExecTaskRequest> = {}, process: object = given()): ExecTaskRequest => ({
    ...{ id: 'c1', execId: 'e1', terminal: false, stdin: '', stdout: '', stderr: '' },
    spec: { typeUrl, value: Buffer.from(JSON.stringify(process)) },
    ...fields,
  });
  const refusal = (...args: Parameters<typeof request>) => {
    const { code, message } = errorOf(() => prepareExec(request(...args), context));
    return `${code}: ${message}`;
  };

  test('becomes what the container runs', () => {
    const prepared = prepareExec(request(), context);
    expect(prepared).toMatchObject({ execId: 'e1', terminal: false, terminalSize: undefined });
    expect(JSON.parse(prepared.process)).toEqual(ctrSpec().process);
    const tty = { ...given(), terminal: true, consoleSize: { width: 80, height: 24 } };
    expect(prepareExec(request({ terminal: true }, tty), context)).toMatchObject({
      terminal: true,
      terminalSize: { width: 80, height: 24 },
    });
  });

  test('may name its type with any prefix, and no other type', () => {
    const value = Buffer.from(JSON.stringify(given()));
    const bare = { typeUrl: 'opencontainers/runtime-spec/1/Process', value };
    expect(prepareExec(request({ spec: bare }), context).execId).toBe('e1');
    expect(refusal({ spec: undefined })).toBe(
      'invalid-argument: exec e1 of container c1: its spec is missing, not an OCI process',
    );
    expect(refusal({ spec: { typeUrl: 'opencontainers/runtime-spec/1/Spec', value } })).toContain(
      'its spec is opencontainers/runtime-spec/1/Spec, not an OCI process',
    );
  });

  test('that is malformed is refused with its name', () => {
    expect(refusal({ spec: { typeUrl, value: Buffer.from('{') } })).toContain(
      'invalid-argument: exec e1 of container c1: not valid JSON',
    );
    expect(refusal({}, { args: [] })).toContain('exec e1 of container c1: args: expected at least one argument');
  });

  test('that and whose spec do not agree on a terminal is refused', () => {
    expect(refusal({ terminal: true })).toBe(
      'invalid-argument: exec e1 of container c1: a terminal is asked for, but process.terminal in its spec is false',
    );
    expect(refusal({}, { ...given(), terminal: true })).toBe(
      'invalid-argument: exec e1 of container c1: no terminal is asked for, but process.terminal in its spec is true',
    );
  });

  test('warns of what is left out', () => {
    warnings.length = 0;
    prepareExec(request({}, { ...given(), apparmorProfile: 'x' }), context);
    expect(warnings).toEqual(['process.apparmorProfile: "x" is not applied: AppArmor is not active in the guest']);
  });
});
