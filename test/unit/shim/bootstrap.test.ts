import { describe, expect, it } from 'vitest';
import { type Bootstrap, encodeStartAnswer, readBootstrap } from '../../../src/shim/control/bootstrap.ts';
import type { StartRequest } from '../../../src/shim/control/request.ts';

const address = 'unix:///run/kiln/s/0123456789abcdef';

/** What is made of a `start` with these fields and this stdin. */
function bootstrap(fields: Partial<StartRequest> = {}): Bootstrap {
  const context = {
    namespace: 'default',
    id: 'web',
    bundle: '/b',
    address: '/run/containerd/containerd.sock',
    ttrpcAddress: '/run/containerd/containerd.sock.ttrpc',
    publishBinary: '/usr/bin/containerd',
    debug: false,
    maxShimVersion: 0,
    launcherStartedNs: 0n,
    ...fields,
  };
  return readBootstrap(context, fields.payload ?? new Uint8Array());
}

/** Hexadecimal with blanks, and text in quotes, as bytes. */
function bytes(text: string): Buffer {
  const parts = text.match(/"[^"]*"|[0-9a-f]{2}/g) ?? [];
  return Buffer.concat(
    parts.map((part) => (part.startsWith('"') ? Buffer.from(part.slice(1, -1)) : Buffer.from(part, 'hex'))),
  );
}

/** What `start` prints for this request. */
const answer = (fields: Partial<StartRequest>): Buffer => Buffer.from(encodeStartAnswer(bootstrap(fields), address));

/** runtimeoptions.v1.Options with config_path /etc/x, as containerd up to 2.2 writes it. */
const options = bytes('0a 19 "runtimeoptions.v1.Options" 12 08 12 06 "/etc/x"');

/** Fields 1 and 2 of BootstrapParams: the container's id and namespace. */
const identity = bytes('0a 03 "web" 12 07 "default"');

/** What containerd 2.3.4 at log level debug writes for `ctr run --runtime-config-path /etc/x`, but with shorter paths. */
const params = Buffer.concat([
  identity,
  bytes('18 fc ff ff ff ff ff ff ff ff 01'), // log_level -4, as every negative int32 in ten bytes
  bytes('22 05 "2.3.4"'),
  bytes('2a 08 "/c.ttrpc" 32 02 "/c" 3a 0b "/containerd"'),
  bytes('42 27 0a 25'), // extensions: one, whose Any has 37 bytes
  options,
  bytes('4a 02 "/s"'), // socket_dir
]);

describe('an answer to start', () => {
  it('is the bare address for a containerd that says nothing of a version, which is 1.6', () => {
    expect(answer({})).toEqual(bytes(`"${address}"`));
    expect(answer({ payload: options })).toEqual(bytes(`"${address}"`));
  });

  it('is JSON of version 2 for containerd 1.7 to 2.2', () => {
    const json = Buffer.from(`{"version":2,"address":"${address}","protocol":"ttrpc"}`);
    expect(answer({ maxShimVersion: 2 })).toEqual(json);
    expect(answer({ maxShimVersion: 2, payload: options })).toEqual(json);
  });

  it('is JSON of version 3 for a containerd that wants at least this one', () => {
    const json = Buffer.from(`{"version":3,"address":"${address}","protocol":"ttrpc"}`);
    expect(answer({ maxShimVersion: 3 })).toEqual(json);
    expect(answer({ maxShimVersion: 4 })).toEqual(json);
  });

  it('is the bare address for a version that is older than both', () => {
    expect(answer({ maxShimVersion: 1 })).toEqual(bytes(`"${address}"`));
  });

  it('is a BootstrapResult where containerd sent BootstrapParams', () => {
    const result = bytes(`08 02 12 23 "${address}" 1a 05 "ttrpc"`);
    expect(answer({ maxShimVersion: 2, payload: params })).toEqual(result);
    expect(answer({ maxShimVersion: 0, payload: params })).toEqual(result);
    expect(answer({ maxShimVersion: 2, payload: identity })).toEqual(result);
  });

  it('is a BootstrapResult of version 3 where containerd wants that', () => {
    expect(answer({ maxShimVersion: 3, payload: params })).toEqual(bytes(`08 03 12 23 "${address}" 1a 05 "ttrpc"`));
  });

  it.each([
    ['of another container', bytes('0a 03 "wet" 12 07 "default"')],
    ['of another namespace', bytes('0a 03 "web" 12 07 "defaulT"')],
    ['without a namespace', bytes('0a 03 "web"')],
    ['that are cut off', params.subarray(0, -1)],
    ['with a field of a wrong type', Buffer.concat([identity, bytes('1f')])],
    ['that are text', Buffer.from('not protobuf at all')],
    ['that are an Any whose value is no text', bytes('0a 03 "web" 12 02 ff fe')],
  ])('takes BootstrapParams %s for the options of an older containerd', (_what, payload) => {
    expect(answer({ payload })).toEqual(bytes(`"${address}"`));
  });

  it('heeds fields that are not known yet as little as containerd does', () => {
    const payload = Buffer.concat([params, bytes('52 03 "new" 58 01')]);
    expect(answer({ payload })[0]).toBe(8);
  });
});

describe('the bootstrap', () => {
  it('has the version of a containerd that tells it', () => {
    expect(bootstrap({ payload: params })).toEqual({
      answer: 'protobuf',
      taskVersion: 2,
      logLevel: 'debug',
      containerdVersion: '2.3.4',
    });
  });

  it.each([
    [true, 'debug'],
    [false, 'info'],
  ] as const)('takes the log level of an older containerd from -debug (%s)', (debug, logLevel) => {
    expect(bootstrap({ debug })).toMatchObject({ logLevel, containerdVersion: '' });
  });

  it.each([
    ['trace', 'f8 ff ff ff ff ff ff ff ff 01', 'debug'],
    ['debug', 'fc ff ff ff ff ff ff ff ff 01', 'debug'],
    ['nearly debug', 'fd ff ff ff ff ff ff ff ff 01', 'debug'],
    ['nearly info', 'ff ff ff ff ff ff ff ff ff 01', 'info'],
    ['info', '00', 'info'],
    ['nearly warn', '03', 'warning'],
    ['warn', '04', 'warning'],
    ['error', '08', 'error'],
    ['panic', '0c', 'error'],
    ['worse than all', 'ff ff ff ff 07', 'error'],
  ])('takes log level %s to be the nearest of ours', (_name, varint, logLevel) => {
    const payload = Buffer.concat([identity, bytes(`18 ${varint}`)]);
    // The flag says the same in coarser words, and is not asked.
    expect(bootstrap({ payload, debug: true })).toMatchObject({ logLevel });
  });
});
