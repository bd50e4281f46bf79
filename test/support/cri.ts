/** CRI as kubelet speaks it: gRPC on containerd's socket. */
import { credentials, type ServiceError } from '@grpc/grpc-js';
import { RuntimeServiceClient } from '../../gen/kubernetes/cri.ts';

type Callback<Response> = (error: ServiceError | null, response: Response) => void;

export class Cri implements Disposable {
  readonly #client: RuntimeServiceClient;

  constructor(address: string) {
    this.#client = new RuntimeServiceClient(`unix://${address}`, credentials.createInsecure());
  }

  /** `cri.call((client, done) => client.version({ version: '' }, done))` */
  call<Response>(method: (client: RuntimeServiceClient, done: Callback<Response>) => unknown): Promise<Response> {
    return new Promise((resolve, reject) => {
      method(this.#client, (error, response) => (error === null ? resolve(response) : reject(error)));
    });
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }
}
