/**
 * Images in archives: OCI image layouts (`oci-layout`, `index.json` and blobs by their digests; image-spec, image-layout.md), and
 * what `docker save` and `podman save` write (`manifest.json`, which names the configuration and the layers). Every file
 * is checked against the digest that names it, as far as one does; layers are, once more, by what they hold unpacked.
 */
import { createHash } from 'node:crypto';
import { Transform } from 'node:stream';
import { z } from 'zod';
import { type Archive, decompressorFor } from './archive.ts';
import { applyLayer, type LayerTarget } from './layer.ts';

const strings = z.array(z.string());
const digest = z.string().regex(/^sha256:[0-9a-f]{64}$/, { error: 'expected sha256: and 64 hexadecimal digits' });
const descriptor = z.object({
  mediaType: z.string().optional(),
  digest,
  platform: z.object({ os: z.string(), architecture: z.string() }).optional(),
  annotations: z.record(z.string(), z.string()).nullish(),
});
const indexSchema = z.object({ manifests: z.array(descriptor) });
const manifestSchema = z.object({ config: descriptor, layers: z.array(descriptor) });
const savedSchema = z.array(z.object({ Config: z.string(), RepoTags: strings.nullish(), Layers: strings }));

const configSchema = z.object({
  os: z.string(),
  architecture: z.string(),
  config: z
    .object({
      User: z.string().nullish(),
      Env: strings.nullish(),
      Entrypoint: strings.nullish(),
      Cmd: strings.nullish(),
      WorkingDir: z.string().nullish(),
    })
    .nullish(),
  rootfs: z.object({ diff_ids: z.array(digest) }),
});

/** image-spec, config.md. */
export type ImageConfig = z.infer<typeof configSchema>;

export interface Image {
  readonly config: ImageConfig;
  /** Paths in the archive, from the bottom up. */
  readonly layers: readonly string[];
}

/** Of Node, as images call it. */
const architectures: Readonly<Record<string, string>> = { x64: 'amd64', arm64: 'arm64' };

/** What the container of this host is to be. */
const platform = { os: 'linux', architecture: architectures[process.arch] ?? process.arch };

/**
 * @param name one of the archive's; it may be left out where there is one image only
 * @throws KilnError invalid-argument for an archive without the image, or for another platform
 */
export async function findImage(archive: Archive, name?: string): Promise<Image> {
  const image = archive.has('index.json') ? await findInLayout(archive, name) : await findSaved(archive, name);
  const { os, architecture, rootfs } = image.config;
  if (os !== platform.os || architecture !== platform.architecture) {
    throw archive.error(`the image is for ${os}/${architecture}, and not for ${platform.os}/${platform.architecture}`);
  }
  if (rootfs.diff_ids.length !== image.layers.length) {
    throw archive.error(`the image has ${image.layers.length} layers, and ${rootfs.diff_ids.length} digests for them`);
  }
  return image;
}

/** Unpacks the layers of an image. Throws what `applyLayer` throws. */
export async function unpackImage(archive: Archive, { layers, config }: Image, target: LayerTarget): Promise<void> {
  for (const [index, path] of layers.entries()) {
    const hash = createHash('sha256');
    const counted = new Transform({
      transform(chunk: Buffer, _encoding, done) {
        hash.update(chunk);
        done(null, chunk);
      },
    });
    const compressed = archive.read(path);
    const start = await startOf(archive, path);
    const decompress = decompressorFor(start);
    const plain = decompress === undefined ? compressed : compressed.pipe(decompress);
    for (const stream of [compressed, plain]) stream.on('error', (error) => counted.destroy(error));
    await applyLayer(plain.pipe(counted), target);
    archive.requireDigest(`layer ${path}`, config.rootfs.diff_ids[index] ?? '', hash.digest('hex'));
  }
}

async function startOf(archive: Archive, path: string): Promise<Buffer> {
  const start = Buffer.alloc(4);
  for await (const chunk of archive.read(path)) {
    (chunk as Buffer).copy(start);
    break;
  }
  return start;
}

const layoutNames = ['io.containerd.image.name', 'org.opencontainers.image.ref.name'];

async function findInLayout(archive: Archive, name: string | undefined): Promise<Image> {
  const { manifests } = parse(archive, 'index.json', indexSchema, await archive.readJson('index.json'));
  const named = manifests.map((manifest) => ({
    manifest,
    names: layoutNames.flatMap((key) => manifest.annotations?.[key] ?? []),
  }));
  const chosen = choose(archive, named, name).map(({ manifest }) => manifest);
  return manifestIn(archive, chosen, 0);
}

/** An index may hold others, one for all platforms for example. */
const maxDepth = 4;

async function manifestIn(
  archive: Archive,
  candidates: readonly z.infer<typeof descriptor>[],
  depth: number,
): Promise<Image> {
  const fits = candidates.find(({ platform: of }) => of === undefined || isOurs(of));
  if (fits === undefined) throw archive.error(`it has no image for ${platform.os}/${platform.architecture}`);
  if (depth > maxDepth) throw archive.error('its indexes lead to indexes again and again');
  const path = blobPath(fits.digest);
  const json = await archive.readJson(path, fits.digest);
  const index = indexSchema.safeParse(json);
  if (index.success) return manifestIn(archive, index.data.manifests, depth + 1);
  const { config, layers } = parse(archive, path, manifestSchema, json);
  const configPath = blobPath(config.digest);
  return {
    config: parse(archive, configPath, configSchema, await archive.readJson(configPath, config.digest)),
    layers: layers.map((layer) => blobPath(layer.digest)),
  };
}

function isOurs({ os, architecture }: { os: string; architecture: string }): boolean {
  return os === platform.os && architecture === platform.architecture;
}

async function findSaved(archive: Archive, name: string | undefined): Promise<Image> {
  if (!archive.has('manifest.json')) {
    throw archive.error('it is no image: it has neither an index.json (OCI) nor a manifest.json (docker save)');
  }
  const saved = parse(archive, 'manifest.json', savedSchema, await archive.readJson('manifest.json'));
  const [image] = choose(
    archive,
    saved.map((entry) => ({ ...entry, names: entry.RepoTags ?? [] })),
    name,
  );
  if (image === undefined) throw archive.error('it has no image');
  const config = parse(archive, image.Config, configSchema, await archive.readJson(image.Config));
  return { config, layers: image.Layers };
}

/** @throws KilnError invalid-argument that lists what there is */
function choose<T extends { readonly names: readonly string[] }>(
  archive: Archive,
  images: readonly T[],
  name: string | undefined,
): readonly T[] {
  const list = images.flatMap(({ names }) => names).join(', ') || 'none with a name';
  if (name === undefined) {
    const distinct = new Set(images.map(({ names }) => names.join(' ')));
    // Without names they can be one image for several platforms.
    if (images.length > 1 && distinct.size > 1) {
      throw archive.error(`it has ${images.length} images; choose one with --image-name: ${list}`);
    }
    return images;
  }
  const chosen = images.filter(({ names }) => names.includes(name));
  if (chosen.length === 0) throw archive.error(`it has no image called ${JSON.stringify(name)}; it has: ${list}`);
  return chosen;
}

function blobPath(name: string): string {
  return `blobs/${name.replace(':', '/')}`;
}

function parse<T>(archive: Archive, path: string, schema: z.ZodType<T>, json: unknown): T {
  const result = schema.safeParse(json);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  throw archive.error(`${path}: ${issue?.path.join('.') || '$'}: ${issue?.message}`);
}
