import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gzipSync, zstdCompressSync } from 'node:zlib';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Archive } from '../../../src/image/archive.ts';
import { findImage, unpackImage } from '../../../src/image/image.ts';
import { imageArchive, type LayerEntry, layerTar, sha256, whiteout } from '../../support/images.ts';

const json = (value: unknown) => JSON.stringify(value);
const file = (path: string, content: string | Buffer = path): LayerEntry => ({ kind: 'file', path, content });
const layers = [
  [file('a'), file('b')],
  [whiteout('a'), file('c')],
];
const platform = { os: 'linux', architecture: process.arch === 'arm64' ? 'arm64' : 'amd64' };

describe('an image in an archive', () => {
  let dir: string;
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'kiln-image-'));
    mkdirSync(join(dir, 'rootfs'));
  });
  afterEach(() => rmSync(dir, { recursive: true, force: true }));

  const open = (bytes: Buffer) => {
    writeFileSync(join(dir, 'image.tar'), bytes);
    return Archive.open(join(dir, 'image.tar'), join(dir, 'scratch'));
  };
  const unpack = async (bytes: Buffer, name?: string) => {
    const archive = await open(bytes);
    const image = await findImage(archive, name);
    await unpackImage(archive, image, { root: join(dir, 'rootfs'), warn: () => {} });
    return image;
  };
  const read = (path: string) => readFileSync(join(dir, 'rootfs', path), 'utf8');
  const oci = () => imageArchive({ name: 'kiln/x:1', layers, config: { Cmd: ['sh'], User: 'kate' } });

  /** As `docker save` writes it, or another program. */
  const saved = async (change: { config?: object; manifest?: object; extra?: LayerEntry[] } = {}) => {
    const tars = await Promise.all(layers.map((entries) => layerTar(entries)));
    const config = { ...platform, config: { Cmd: ['sh'] }, rootfs: { type: 'layers', diff_ids: tars.map(sha256) } };
    const manifest = { Config: 'c.json', RepoTags: ['kiln/x:1'], Layers: ['0/layer.tar', '1.tar'] };
    return layerTar([
      file('c.json', json({ ...config, ...change.config })),
      file('0/layer.tar', tars[0]!),
      { kind: 'symlink', path: '1.tar', target: '0/../real/1' },
      file('real/1', tars[1]!),
      ...(change.extra ?? []),
      file('manifest.json', json([{ ...manifest, ...change.manifest }])),
    ]);
  };

  it('of an OCI layout is unpacked, layer by layer', async () => {
    const { config } = await unpack(await oci());
    expect([read('b'), read('c')]).toEqual(['b', 'c']);
    expect(() => read('a')).toThrow();
    expect(config.config).toMatchObject({ Cmd: ['sh'], User: 'kate' });
  });

  it('of `docker save` is unpacked, through its links', async () => {
    await unpack(await saved());
    expect([read('b'), read('c')]).toEqual(['b', 'c']);
    expect(() => read('a')).toThrow();
  });

  it.each([
    ['gzip', gzipSync],
    ['zstd', zstdCompressSync],
  ])('may be compressed as a whole, by %s', async (_name, compress) => {
    await unpack(compress(await saved()));
    expect(read('c')).toBe('c');
  });

  it('is found by its name', async () => {
    await unpack(await oci(), 'kiln/x:1');
    await expect(unpack(await oci(), 'kiln/y:1')).rejects.toThrow(
      `${dir}/image.tar: it has no image called "kiln/y:1"; it has: kiln/x:1`,
    );
    await expect(unpack(await saved(), 'kiln/y:1')).rejects.toThrow(/it has: kiln\/x:1$/);
  });

  it('must be named where there are several', async () => {
    const [one, other] = ['kiln/x:1', 'kiln/y:2'].map((tag) => ({ Config: 'c.json', RepoTags: [tag], Layers: [] }));
    const both = await layerTar([file('manifest.json', json([one, other]))]);
    await expect(unpack(both)).rejects.toThrow(/2 images; choose one with --image-name: kiln\/x:1, kiln\/y:2$/);
  });

  it('of another platform is refused by both names', async () => {
    const config = { architecture: 's390x' };
    await expect(unpack(await saved({ config }))).rejects.toThrow(/the image is for linux\/s390x, and not for linux\//);
  });

  it.each<[string, () => Promise<Buffer>, RegExp]>([
    ['no tar', async () => Buffer.from('hello, this is no archive'), /cannot be read as a tar archive/],
    ['a tar that is cut off', async () => (await oci()).subarray(0, 3000), /cannot be read as a tar archive/],
    ['a gzip that is cut off', async () => gzipSync(await oci()).subarray(0, 500), /cannot be read as a tar archive/],
    ['no image', () => layerTar([file('x')]), /it is no image: it has neither/],
    ['an index that is no JSON', () => layerTar([file('index.json', '{')]), /index\.json is not valid JSON/],
    ['an index of another shape', () => layerTar([file('index.json', '{}')]), /index\.json: manifests: /],
    ['an index that is too long', () => layerTar([file('index.json', Buffer.alloc(5e6, ' '))]), /too much/],
    ['a missing configuration', () => saved({ manifest: { Config: 'none.json' } }), /none\.json is missing/],
    ['a missing layer', () => saved({ manifest: { Layers: ['0/layer.tar', 'none'] } }), /none is missing/],
    ['too few layers', () => saved({ manifest: { Layers: [] } }), /0 layers, and 2 digests/],
    [
      'links that go round',
      () => saved({ manifest: { Layers: ['0/layer.tar', 'x'] }, extra: [{ kind: 'symlink', path: 'x', target: 'x' }] }),
      /x is missing/,
    ],
    ['a path that climbs', () => saved({ manifest: { Config: '../../etc/passwd' } }), /no place in it/],
    [
      'a digest that climbs',
      () => layerTar([file('index.json', json({ manifests: [{ digest: 'sha256:../../x' }] }))]),
      /manifests\.0\.digest/,
    ],
    [
      'a layer with other contents',
      () => saved({ config: { rootfs: { diff_ids: ['a', 'b'].map((digit) => `sha256:${digit.repeat(64)}`) } } }),
      /layer 0\/layer\.tar is damaged: its digest is sha256:[0-9a-f]{64}, not sha256:aaaa/,
    ],
  ])('is refused where it is %s', async (_what, bytes, message) => {
    await expect(unpack(await bytes())).rejects.toMatchObject({
      code: 'invalid-argument',
      message: expect.stringMatching(message),
    });
  });

  it('with a manifest that was changed is refused by its digest', async () => {
    const archive = await oci();
    const at = archive.indexOf('"schemaVersion":2,"mediaType"');
    archive.write('"schemaVersion":3,"mediaType"', at);
    await expect(unpack(archive)).rejects.toThrow(/blobs\/sha256\/[0-9a-f]{64} is damaged/);
  });

  it('with an index that leads to itself ends', async () => {
    // Its own digest nobody can write into it; a chain that is too long is as good.
    const blobs: LayerEntry[] = [];
    let index = json({ manifests: [] });
    for (let depth = 0; depth < 10; depth++) {
      const digest = sha256(Buffer.from(index));
      blobs.push(file(`blobs/${digest.replace(':', '/')}`, index));
      index = json({ manifests: [{ digest }] });
    }
    await expect(unpack(await layerTar([...blobs, file('index.json', index)]))).rejects.toThrow(/again and again/);
  });
});
