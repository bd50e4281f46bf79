import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import {
  type ControlRequest,
  controlMessageLimit,
  encodeControlReply,
  encodeControlRequest,
  parseControlReply,
  parseControlRequest,
} from '../../../src/shim/control/request.ts';

const fields: Readonly<Record<string, string>> = {
  protocol: '2',
  action: 'start',
  namespace: 'default',
  id: 'c1',
  bundle: '/b',
  address: '',
  ttrpc_address: '',
  publish_binary: '',
  debug: '0',
  max_shim_version: '',
  launcher_started_ns: '12',
};

/** The bytes of a start request with some fields changed, or left out where the value is null. */
function withFields(changes: Readonly<Record<string, string | null>>, payload = ''): Buffer {
  const all = Object.entries({ ...fields, ...changes }).filter(([, value]) => value !== null);
  return Buffer.from(`${all.map(([key, value]) => `${key}=${value}\0`).join('')}\0${payload}`);
}

const line = fc
  .string({ unit: 'binary', maxLength: 40 })
  .filter((value) => !value.includes('\0') && value.isWellFormed());
const identifier = fc.stringMatching(/^[A-Za-z0-9][A-Za-z0-9._-]{0,75}$/);
const context = {
  namespace: identifier,
  id: identifier,
  bundle: line.map((value) => `/${value}`),
  address: line,
  ttrpcAddress: line,
  publishBinary: line,
  debug: fc.boolean(),
  maxShimVersion: fc.nat(999_999_999),
  launcherStartedNs: fc.bigInt({ min: 0n, max: 9_999_999_999_999_999_999n }),
};
const anyRequest: fc.Arbitrary<ControlRequest> = fc.oneof(
  fc.record({ kind: fc.constant('start' as const), ...context, payload: fc.uint8Array() }),
  fc.record({ kind: fc.constant('delete' as const), ...context }),
  fc.record({ kind: fc.constantFrom('status' as const, 'stop' as const) }),
  fc.record({ kind: fc.constant('timeline' as const), namespace: context.namespace, id: context.id }),
);

describe('control request', () => {
  test('what is encoded is parsed back', () => {
    fc.assert(
      fc.property(anyRequest, (request) => {
        const parsed = parseControlRequest(encodeControlRequest(request));
        if (parsed.kind === 'start') expect({ ...parsed, payload: Uint8Array.from(parsed.payload) }).toEqual(request);
        else expect(parsed).toEqual(request);
      }),
      { seed: 1, numRuns: 2000 },
    );
  });

  test('bytes of any kind are parsed or refused with a KilnError, never another one', () => {
    const corrupted = fc
      .tuple(anyRequest, fc.array(fc.tuple(fc.nat(), fc.nat(255))), fc.nat())
      .map(([request, changes, length]) => {
        const bytes = Buffer.from(encodeControlRequest(request));
        for (const [at, value] of changes) bytes[at % bytes.length] = value;
        return bytes.subarray(0, length % (bytes.length + 1));
      });
    fc.assert(
      fc.property(fc.oneof(fc.uint8Array(), corrupted), (bytes) => {
        try {
          parseControlRequest(bytes);
        } catch (error) {
          if (!(error instanceof KilnError)) throw error;
        }
      }),
      { seed: 2, numRuns: 20_000 },
    );
  });

  test('fields that this version does not know are skipped', () => {
    expect(parseControlRequest(withFields({ colour: 'red=blue' }))).toMatchObject({ kind: 'start', id: 'c1' });
  });

  test.each([
    ['3', 3],
    ['', 0],
    ['2 ', 0],
    ['-2', 0],
    ['0x2', 0],
    ['9999999999', 0],
  ])('MAX_SHIM_VERSION "%s" counts as %i: the environment may be anybody\'s', (text, maxShimVersion) => {
    expect(parseControlRequest(withFields({ max_shim_version: text }))).toMatchObject({ maxShimVersion });
  });

  test.each([
    ['nothing at all', Buffer.alloc(0), 'ends within its header'],
    ['no end of the header', Buffer.from('protocol=2\0action=stop\0'), 'ends within its header'],
    ['an empty header', Buffer.from('\0'), 'lacks the field "protocol"'],
    ['a field without =', Buffer.from('protocol\0a=b\0\0'), 'has the field "protocol" without "="'],
    ['a field twice', Buffer.from('protocol=2\0protocol=2\0\0'), 'has the field "protocol" twice'],
    ['a field that is not UTF-8', Buffer.from('70726f746f636f6c3dff0000', 'hex'), 'a field that is not UTF-8'],
    ['another protocol', withFields({ protocol: '1' }), 'has protocol "1", this kilnd speaks 2'],
    ['an unknown action', withFields({ action: 'explode' }), 'the unknown action "explode"'],
    ['a missing field', withFields({ bundle: null }), 'lacks the field "bundle"'],
    ['a relative bundle', withFields({ bundle: 'b' }), '"bundle" must be an absolute path, not "b"'],
    ['an id that climbs', withFields({ id: '../x' }), '"id" must be 1 to 76 letters'],
    ['an id of dots', withFields({ id: '..' }), '"id" must be 1 to 76 letters'],
    ['an id with a newline at its end', withFields({ id: 'a\n' }), '"id" must be 1 to 76 letters'],
    ['an empty namespace', withFields({ namespace: '' }), '"namespace" must be 1 to 76 letters'],
    ['a namespace that is too long', withFields({ namespace: 'n'.repeat(77) }), '"namespace" must be 1 to 76 letters'],
    ['a debug that is no bit', withFields({ debug: 'yes' }), '"debug" must be 0 or 1, not "yes"'],
    ['a time that is none', withFields({ launcher_started_ns: '-1' }), '"launcher_started_ns" must be a number'],
    ['a payload where none belongs', withFields({ action: 'delete' }, 'x'), '"delete" takes no payload'],
  ])('%s is refused by name', (_name, bytes, message) => {
    expect(() => parseControlRequest(bytes)).toThrow(message);
  });

  test('a value with a NUL is not encoded, since it would end the field', () => {
    const request = { ...parseControlRequest(withFields({})), bundle: '/a\0id=b' } as ControlRequest;
    expect(() => encodeControlRequest(request)).toThrow('"bundle" must not hold a NUL byte');
  });

  test('the size limit holds for both directions and names both numbers', () => {
    const limit = `has ${controlMessageLimit + 1} bytes, the limit is ${controlMessageLimit}`;
    expect(() => parseControlRequest(new Uint8Array(controlMessageLimit + 1))).toThrow(`control request ${limit}`);
    const stdout = new Uint8Array(controlMessageLimit - 1);
    expect(() => encodeControlReply({ exitCode: 0, stdout })).toThrow(`control reply ${limit}`);
    expect(encodeControlReply({ exitCode: 0, stdout: stdout.subarray(1) })).toHaveLength(controlMessageLimit);
  });
});

describe('control reply', () => {
  test('what is encoded is parsed back', () => {
    fc.assert(
      fc.property(fc.nat(255), fc.uint8Array(), line, (exitCode, stdout, relaySocket) => {
        const reply = parseControlReply(encodeControlReply({ exitCode, stdout, relaySocket }));
        expect(reply?.exitCode).toBe(exitCode);
        expect(reply?.relaySocket ?? '').toBe(relaySocket);
        expect(Buffer.from(reply?.stdout ?? []).equals(stdout)).toBe(true);
      }),
      { seed: 3 },
    );
  });

  test('no byte at all is no reply', () => {
    expect(parseControlReply(new Uint8Array())).toBeNull();
  });

  test('without the end of the socket path it was cut short', () => {
    expect(() => parseControlReply(Buffer.from('\0/run/k'))).toThrow('in the middle of its answer');
  });

  test.each([-1, 256, 1.5, Number.NaN])('exit code %d is refused', (exitCode) => {
    expect(() => encodeControlReply({ exitCode, stdout: new Uint8Array() })).toThrow('is not an integer from 0 to 255');
  });
});
